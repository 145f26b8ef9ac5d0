"""The kinds of tools: what a user asks for, and under which names a tool may offer it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from world_chat import NAMES
from world_facts import COUNTRIES
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
    return _nonsense(rng) if rng.random() < 0.15 else rng.choice(_CITIES)


def _person(rng: random.Random) -> str:
    return _nonsense(rng) if rng.random() < 0.1 else rng.choice(NAMES)


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
)
