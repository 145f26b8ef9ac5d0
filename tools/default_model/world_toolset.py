"""The kinds of tools: what a user asks for, and under which names a tool may offer it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from world_chat import NAMES
from world_facts import COUNTRIES
from world_split import expand
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
    return _nonsense(rng) if rng.random() < 0.05 else rng.choice(_CITIES)


def _person(rng: random.Random) -> str:
    return _nonsense(rng) if rng.random() < 0.05 else rng.choice(NAMES)


def _text(rng: random.Random) -> str:
    return (
        rng.choice(_TOPICS)
        if rng.random() < 0.7
        else " ".join(rng.sample(WORDS, rng.randint(1, 2)))
    )


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

_PLEASE = "[|Please |Can you |Could you |Now ]"

TOOL_KINDS: tuple[ToolKind, ...] = (
    ToolKind(
        "weather",
        ("get_weather", "weather", "get_current_weather", "fetch_weather", "weather_now"),
        ("Get the weather of a city.", "Get the current weather in a given location."),
        (_CITY,),
        expand(
            "[What is|What's|How is|Tell me|Get|Check|Show me|I need] the [|current ]weather in "
            "{0}[| today| now| right now].",
            "[What is|What's] the weather like in {0}[| today| now| right now]?",
            "Get the weather for {0}[|, please].",
            "Is it [raining|sunny|cold|warm] in {0}[| today| now| right now]?",
            "[|Current ]weather in {0}[|, please| now]?",
        ),
    ),
    ToolKind(
        "time",
        ("get_time", "current_time", "time_in", "clock", "local_time"),
        ("Get the local time of a city.", "Tell what time it is in a place."),
        (_CITY,),
        expand(
            "[What is|What's|Tell me|Get|Show me|I need|Check] the [|local |current ]time in "
            "{0}[| now| right now].",
            "[What time|How late] is it in {0}[| now| right now]?",
            "[|Local |Current ]time in {0}[|, please| now]?",
            "[Tell me|Do you know] [what time|how late] it is in {0}.",
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
        expand(
            _PLEASE + "[send|write] [|an ][email|mail] to {0} about {1}[|, please].",
            _PLEASE + "[email|mail] {0} about {1}[|, please].",
            _PLEASE + "[send|write] {0} [an email|a mail] about {1}.",
            "I [want|need|would like] to [send|write] [an email|a mail] to {0} about {1}.",
            "I [want|need|would like] to [email|mail] {0} about {1}.",
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
        expand(
            _PLEASE + "[set|start|make] a timer [for|of] {0} minutes[|, please].",
            _PLEASE + "[set|start|make] a {0} minute timer[|, please].",
            "I [need|want|would like] a timer [for|of] {0} minutes.",
            "I [need|want|would like] a {0} minute timer.",
            "[|A ]timer for {0} minutes[|, please].",
            "[|A ]{0} minute timer[|, please].",
        ),
    ),
    ToolKind(
        "alarm",
        ("set_alarm", "alarm", "wake_up", "add_alarm", "alarm_clock"),
        ("Set an alarm.", "Wake the user at a given time."),
        (Parameter(("time", "at", "hour", "clock_time"), "string", "The time of day.", _clock),),
        expand(
            _PLEASE + "set [an|the|my] alarm [for|to|at] {0}[|, please].",
            _PLEASE + "wake me [|up ]at {0}[|, please].",
            "I [need|want|would like] an alarm [for|at] {0}.",
            "I [need|want|have] to [wake|get] up at {0}.",
            "[|An ]alarm [for|at] {0}[|, please].",
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
        expand(
            _PLEASE + "translate {0} [into|to] {1}[|, please].",
            "[How do|How can] [you|I|we] say {0} in {1}?",
            _PLEASE + "say {0} in {1}[|, please].",
            "What is {0} in {1}?",
            "I [need|want|would like] a translation of {0} [into|to] {1}.",
            "What is the translation of {0} [into|to|in] {1}?",
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
        expand(
            _PLEASE + "[turn|switch|put] [|the ]light in the {0} {1}[|, please].",
            _PLEASE + "[turn|switch|put] the {0} light {1}[|, please].",
            _PLEASE + "[turn|switch|put] {1} the [light in the {0}|{0} light].",
            _PLEASE + "set the [light in the {0}|{0} light] to {1}.",
            "Light in the {0} {1}[|, please].",
        ),
    ),
    ToolKind(
        "search",
        ("search_web", "web_search", "search", "find", "lookup"),
        ("Search the web.", "Find pages on the internet."),
        (Parameter(("query", "q", "text", "keywords"), "string", "What to search.", _text),),
        expand(
            _PLEASE + "search [|the web |the internet |online ]for {0}[|, please].",
            _PLEASE + "[look for|find] {0} [on the web|on the internet|online].",
            _PLEASE
            + "find [pages|something|articles] about {0}[| on the web| on the internet| online].",
            _PLEASE + "do a [web|internet] search for {0}.",
            "I [want|need|would like] to search [|the web |the internet ]for {0}.",
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
        expand(
            _PLEASE + "[call|phone|ring] {0}[|, please| now].",
            _PLEASE + "[make|start] a [|phone ]call [to|with] {0}.",
            _PLEASE + "give {0} a [|phone ]call[|, please].",
            "I [want|need|would like] to [call|phone|ring] {0}[| now].",
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
        expand(
            _PLEASE + "send [|a message |this message |the message |a text ]to {0}: {1}",
            _PLEASE + "[text|message|tell] {0}: {1}",
            _PLEASE + "send {0} [a|this|the] [message|text]: {1}",
            _PLEASE + "write [|a message |this message |the message |a text ]to {0}: {1}",
        ),
    ),
)
