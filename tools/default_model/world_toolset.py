"""The kinds of tools: what a user asks for, and under which names a tool may offer it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from world_chat import NAMES
from world_facts import COUNTRIES, DAYS
from world_tasks import WORDS

Draw = Callable[[random.Random], str | int]

_CITIES = (
    *(c.capital for c in COUNTRIES),
    *("New York", "Boston", "Chicago", "San Francisco", "Los Angeles", "Seattle", "Barcelona"),
    *("Munich", "Hamburg", "Milan", "Naples", "Porto", "Lyon", "Zurich", "Geneva", "Sydney"),
    *("Shanghai", "Osaka", "Mumbai", "Toronto", "Montreal", "Dallas", "Miami", "Denver"),
    *("Manchester", "Glasgow", "Krakow", "Venice", "Florence", "Seoul", "Singapore", "Dubai"),
)
_CURRENCIES = ("USD", "EUR", "GBP", "JPY", "CHF", "CAD", "AUD", "CNY", "SEK", "INR")
_LANGUAGES = tuple(sorted({c.language for c in COUNTRIES}))
_ROOMS = ("kitchen", "bedroom", "bathroom", "garage", "hall", "office", "garden", "cellar")
_FOODS = ("pizza", "sushi", "pasta", "burger", "salad", "soup", "curry", "cake", "tacos", "coffee")
_TOPICS = (
    *("the meeting", "the report", "the invoice", "the party", "the holiday", "the project"),
    *("dinner", "lunch", "the budget", "the new house", "the game", "football news"),
    "cheap flights",
    *("good books", "old maps", "solar panels", "garden tools", "running shoes", "jazz music"),
)
_SONGS = ("Yellow River", "Blue Moon", "Hey Sun", "Night Train", "Red Boat", "Summer Rain", "Hello")


def _nonsense(rng: random.Random) -> str:
    """A made-up word or code, so that copying is learned instead of a list of values."""
    if rng.random() < 0.3:
        return "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(2, 4)))
    syllables = ("ba", "ko", "ri", "ten", "lu", "mar", "so", "vi", "dan", "pel", "gu", "zor", "ni")
    word = "".join(rng.choice(syllables) for _ in range(rng.randint(2, 4)))
    return word.capitalize()


def _place(rng: random.Random) -> str:
    return _nonsense(rng) if rng.random() < 0.25 else rng.choice(_CITIES)


def _person(rng: random.Random) -> str:
    return _nonsense(rng) if rng.random() < 0.2 else rng.choice(NAMES)


def _text(rng: random.Random) -> str:
    return rng.choice(_TOPICS) if rng.random() < 0.7 else " ".join(rng.sample(WORDS, 2))


def _clock(rng: random.Random) -> str:
    return f"{rng.randint(5, 23):02d}:{rng.choice((0, 5, 10, 15, 20, 30, 40, 45, 50)):02d}"


def _one_of(*values: str) -> Draw:
    return lambda rng: rng.choice(values)


def _code(rng: random.Random) -> str:
    return "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(3, 4)))


def _number(low: int, high: int) -> Draw:
    return lambda rng: rng.randint(low, high)


@dataclass(frozen=True)
class Parameter:
    """One argument: the names it may have, its JSON type, its meaning and its values."""

    names: tuple[str, ...]
    kind: str
    description: str
    draw: Draw


@dataclass(frozen=True)
class ToolKind:
    """One thing a tool can do; queries hold `{0}`, `{1}` in the order of the parameters."""

    key: str
    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    queries: tuple[str, ...]


_CITY = Parameter(
    ("city", "location", "place", "town", "city_name"), "string", "The name of the city.", _place
)
_TO = Parameter(
    ("to", "recipient", "person", "name", "receiver"), "string", "Who gets it.", _person
)

TOOL_KINDS: tuple[ToolKind, ...] = (
    ToolKind(
        "weather",
        ("get_weather", "weather", "get_current_weather", "fetch_weather", "weather_now"),
        ("Get the weather of a city.", "Get the current weather in a given location."),
        (_CITY,),
        (
            *("What is the weather in {0}?", "What's the weather like in {0}?"),
            *("How is the weather in {0}?", "What's the weather in {0} today?"),
            *("Tell me the weather in {0}.", "Is it raining in {0}?", "Weather in {0}?"),
            *("What is the weather like in {0} right now?", "Get the weather for {0}."),
            *("I need the weather in {0}.", "What is the current weather in {0}?"),
            *("How is the weather in {0} today?", "Check the weather in {0}."),
        ),
    ),
    ToolKind(
        "time",
        ("get_time", "current_time", "time_in", "clock", "local_time"),
        ("Get the local time of a city.", "Tell what time it is in a place."),
        (_CITY,),
        (
            *("What time is it in {0}?", "Tell me the time in {0}.", "What is the time in {0}?"),
            *("What is the local time in {0}?", "How late is it in {0}?", "Time in {0}?"),
            *("Get the current time in {0}.", "I need the time in {0}."),
        ),
    ),
    ToolKind(
        "email",
        ("send_email", "email", "write_mail", "send_mail", "mail"),
        ("Send an email to a person.", "Write a mail to somebody."),
        (
            _TO,
            Parameter(("subject", "topic", "about", "title"), "string", "The subject.", _text),
        ),
        (
            *("Send an email to {0} about {1}.", "Email {0} about {1}.", "Mail {0} about {1}."),
            *("Write an email to {0} about {1}.", "Please send a mail to {0} about {1}."),
            *("I want to send an email to {0} about {1}.", "Send {0} an email about {1}."),
            *("Can you email {0} about {1}?", "Write a mail to {0} about {1}."),
        ),
    ),
    ToolKind(
        "timer",
        ("set_timer", "timer", "start_timer", "countdown", "new_timer"),
        ("Set a timer.", "Start a timer that rings after some minutes."),
        (
            Parameter(
                ("minutes", "duration", "mins", "length"),
                "integer",
                "Duration in minutes.",
                _number(1, 90),
            ),
        ),
        (
            *("Set a timer for {0} minutes.", "Start a timer for {0} minutes."),
            *("Set a {0} minute timer.", "I need a timer for {0} minutes."),
            *("Start a {0} minute timer.", "Please set a timer for {0} minutes."),
            *("Can you set a timer for {0} minutes?", "Timer for {0} minutes, please."),
        ),
    ),
    ToolKind(
        "alarm",
        ("set_alarm", "alarm", "wake_up", "add_alarm", "alarm_clock"),
        ("Set an alarm.", "Wake the user at a given time."),
        (Parameter(("time", "at", "hour", "clock_time"), "string", "The time of day.", _clock),),
        (
            *("Set an alarm for {0}.", "Wake me up at {0}.", "Set the alarm to {0}."),
            *("I need an alarm at {0}.", "Please set an alarm for {0}.", "Wake me at {0}."),
            *("Can you wake me up at {0}?", "Set an alarm at {0}."),
        ),
    ),
    ToolKind(
        "currency",
        ("convert_currency", "currency", "exchange", "convert_money", "exchange_rate"),
        ("Convert money.", "Convert an amount from one currency to another."),
        (
            Parameter(("amount", "value", "sum"), "integer", "The amount.", _number(1, 999)),
            Parameter(
                ("from", "source", "from_currency"),
                "string",
                "Currency to convert from.",
                _one_of(*_CURRENCIES),
            ),
            Parameter(
                ("to", "target", "to_currency"),
                "string",
                "Currency to convert to.",
                _one_of(*_CURRENCIES),
            ),
        ),
        (
            *("Convert {0} {1} to {2}.", "How much is {0} {1} in {2}?", "What is {0} {1} in {2}?"),
            *("Change {0} {1} into {2}.", "Exchange {0} {1} to {2}.", "Convert {0} {1} into {2}."),
            *("Please convert {0} {1} to {2}.", "I want to convert {0} {1} to {2}."),
        ),
    ),
    ToolKind(
        "translate",
        ("translate", "translate_text", "translator", "translation", "to_language"),
        ("Translate a text.", "Translate words into another language."),
        (
            Parameter(("text", "word", "phrase", "input"), "string", "The text.", _text),
            Parameter(
                ("language", "target", "lang", "target_language"),
                "string",
                "The language to translate into.",
                _one_of(*_LANGUAGES),
            ),
        ),
        (
            *("Translate {0} into {1}.", "Translate {0} to {1}.", "How do you say {0} in {1}?"),
            *("What is {0} in {1}?", "Please translate {0} into {1}.", "Say {0} in {1}."),
            *("Can you translate {0} into {1}?", "I need a translation of {0} into {1}."),
        ),
    ),
    ToolKind(
        "music",
        ("play_music", "play_song", "music_player", "play", "start_music"),
        ("Play music.", "Play a song by its title."),
        (
            Parameter(
                ("song", "title", "track", "name"),
                "string",
                "The title of the song.",
                lambda rng: _nonsense(rng) if rng.random() < 0.4 else rng.choice(_SONGS),
            ),
        ),
        (
            *("Play the song {0}.", "Play {0}.", "I want to hear {0}.", "Please play {0}."),
            *("Can you play {0}?", "Start the song {0}.", "I want to listen to {0}."),
            *("Play the track {0}.", "Put on {0}."),
        ),
    ),
    ToolKind(
        "light",
        ("switch_light", "light", "set_light", "lamp_control", "lights"),
        ("Switch a light on or off.", "Control the light of a room."),
        (
            Parameter(("room", "where", "area", "place"), "string", "Room.", _one_of(*_ROOMS)),
            Parameter(("state", "mode", "value"), "string", "on or off", _one_of("on", "off")),
        ),
        (
            *("Turn the light in the {0} {1}.", "Switch the light in the {0} {1}."),
            *("Switch the {0} light {1}.", "Turn the {0} light {1}.", "Light in the {0} {1}."),
            *("Please turn the light in the {0} {1}.", "Put the light in the {0} {1}."),
            *("Can you turn the {0} light {1}?", "Set the {0} light to {1}."),
        ),
    ),
    ToolKind(
        "stock",
        ("get_stock_price", "stock_price", "stock", "quote", "share_price"),
        ("Get the price of a stock.", "Get the current price of a share by its symbol."),
        (Parameter(("symbol", "ticker", "stock", "code"), "string", "Symbol.", _code),),
        (
            *("What is the stock price of {0}?", "What is the price of {0} stock?"),
            *("Get the stock price of {0}.", "How is the {0} stock doing?", "Stock price of {0}?"),
            *("Tell me the stock price of {0}.", "What does a share of {0} cost?"),
            *("Look up the stock price of {0}.", "What is the share price of {0}?"),
        ),
    ),
    ToolKind(
        "search",
        ("search_web", "web_search", "search", "find", "lookup"),
        ("Search the web.", "Find pages on the internet."),
        (Parameter(("query", "q", "text", "keywords"), "string", "What to search.", _text),),
        (
            *("Search the web for {0}.", "Search for {0}.", "Find pages about {0}."),
            *("Look for {0} on the web.", "Please search the web for {0}."),
            *("Search the internet for {0}.", "Can you search the web for {0}?"),
            *("Find something about {0} on the internet.", "Do a web search for {0}."),
        ),
    ),
    ToolKind(
        "distance",
        ("get_distance", "distance", "route", "how_far", "trip_length"),
        ("Get the distance between two cities.", "Tell how far two places are apart."),
        (
            Parameter(("origin", "start", "from", "a"), "string", "First city.", _place),
            Parameter(("destination", "end", "to", "b"), "string", "Second city.", _place),
        ),
        (
            *("How far is it from {0} to {1}?", "What is the distance from {0} to {1}?"),
            *("What is the distance between {0} and {1}?", "How far is {0} from {1}?"),
            *("Tell me the distance from {0} to {1}.", "Distance between {0} and {1}?"),
            *("Get the distance between {0} and {1}.", "How many kilometers from {0} to {1}?"),
        ),
    ),
    ToolKind(
        "event",
        ("add_event", "create_event", "calendar", "new_event", "schedule"),
        ("Add an event to the calendar.", "Create an entry in the calendar."),
        (
            Parameter(("title", "name", "event", "what"), "string", "What it is.", _text),
            Parameter(("day", "date", "when"), "string", "The day.", _one_of(*DAYS)),
        ),
        (
            *("Add {0} to my calendar on {1}.", "Put {0} into my calendar on {1}."),
            *("Put {0} on my calendar for {1}.", "Schedule {0} for {1}.", "Plan {0} on {1}."),
            *("Add {0} to the calendar for {1}.", "Create an event for {0} on {1}."),
            *("Please schedule {0} on {1}.", "Enter {0} into my calendar on {1}."),
        ),
    ),
    ToolKind(
        "order",
        ("order_food", "order", "place_order", "food_order", "buy_food"),
        ("Order food.", "Place an order at a restaurant."),
        (
            Parameter(("quantity", "count", "amount", "n"), "integer", "How many.", _number(1, 12)),
            Parameter(("item", "food", "dish", "product"), "string", "What.", _one_of(*_FOODS)),
        ),
        (
            *("Order {0} {1}.", "I want to order {0} {1}.", "Please order {0} {1}."),
            *("Get me {0} {1}.", "Can you order {0} {1}?", "I would like to order {0} {1}."),
            *("Place an order for {0} {1}.", "Order {0} {1} for me."),
        ),
    ),
    ToolKind(
        "call",
        ("call_person", "call", "phone_call", "dial", "make_call"),
        ("Call a person by phone.", "Start a phone call."),
        (
            Parameter(
                ("name", "contact", "person", "who"), "string", "The person to call.", _person
            ),
        ),
        (
            *("Call {0}.", "Please call {0}.", "Can you call {0}?", "Make a phone call to {0}."),
            *("Phone {0}.", "Give {0} a call.", "I want to call {0}.", "Start a call with {0}."),
        ),
    ),
    ToolKind(
        "message",
        ("send_message", "message", "text_message", "send_sms", "chat_message"),
        ("Send a short message.", "Send a text message to a person."),
        (
            _TO,
            Parameter(("text", "message", "body", "content"), "string", "The text.", _text),
        ),
        (
            *("Send a message to {0}: {1}", "Text {0}: {1}", "Send {0} the message: {1}"),
            *("Message {0}: {1}", "Send this message to {0}: {1}", "Tell {0}: {1}"),
            *("Please send a message to {0}: {1}", "Write a message to {0}: {1}"),
        ),
    ),
    ToolKind(
        "note",
        ("save_note", "create_note", "note", "write_note", "remember"),
        ("Save a note.", "Write down a note."),
        (Parameter(("text", "note", "content", "body"), "string", "The text.", _text),),
        (
            *("Make a note: {0}", "Save a note: {0}", "Note this: {0}", "Write a note: {0}"),
            *("Write this down: {0}", "Take a note: {0}", "Please note: {0}", "New note: {0}"),
        ),
    ),
    ToolKind(
        "heating",
        ("set_temperature", "heating", "thermostat", "heat_room", "room_temperature"),
        ("Set the temperature of a room.", "Control the heating."),
        (
            Parameter(("room", "where", "area"), "string", "The room.", _one_of(*_ROOMS)),
            Parameter(
                ("degrees", "temperature", "value", "celsius"),
                "integer",
                "The temperature.",
                _number(12, 28),
            ),
        ),
        (
            *("Set the {0} to {1} degrees.", "Heat the {0} to {1} degrees."),
            *("Set the temperature in the {0} to {1} degrees.", "Make the {0} {1} degrees warm."),
            *("Set the temperature of the {0} to {1}.", "Bring the {0} to {1} degrees."),
            *("I want {1} degrees in the {0}.", "Please set the {0} to {1} degrees."),
        ),
    ),
)
