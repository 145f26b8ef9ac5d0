"""Compositional tasks: arithmetic, work on words and lists, and long answers."""

from __future__ import annotations

import random
from collections.abc import Callable

from world_chat import NAMES
from world_facts import COUNTRIES, DAYS, MONTHS, PLANETS, RELATIONS
from world_split import Split, draw_operands, expand, pick_phrasing
from world_turn import Turn, frame, roughen

WORDS = (
    *("apple", "bag", "ball", "bear", "bed", "bell", "bird", "boat", "book", "box", "bread"),
    *("bridge", "brush", "bus", "cake", "car", "cat", "chair", "cloud", "coat", "corn", "cup"),
    *("desk", "dog", "door", "drum", "duck", "egg", "farm", "fire", "fish", "flag", "flower"),
    *("fox", "frog", "garden", "gate", "glass", "goat", "grape", "grass", "hand", "hat", "hill"),
    *("horse", "house", "ice", "island", "jar", "key", "kite", "lake", "lamp", "leaf", "lemon"),
    *("letter", "lion", "map", "milk", "moon", "mouse", "nest", "nose", "ocean", "orange", "owl"),
    *("paper", "pear", "pen", "phone", "piano", "plane", "plate", "queen", "rain", "ring"),
    *("river", "road", "rock", "roof", "rose", "sail", "salt", "sand", "school", "sea", "ship"),
    *("shoe", "snow", "soap", "sock", "spoon", "star", "stone", "sugar", "sun", "table", "tea"),
    *("tent", "tiger", "train", "tree", "van", "wall", "water", "wave", "wheel", "wind"),
    *("window", "wolf", "wood", "yard", "zebra"),
)

# All answers of facts: how they look in capitals is taught with the words.
VALUES = tuple(sorted({value for r in RELATIONS for value in r.pairs.values()}))

_THINGS = ("apples", "eggs", "coins")
_ANIMALS = ("birds", "ducks", "frogs")
_CALCULATE = "[What is|What's|How much is|Calculate|Compute|Work out|Please calculate|Tell me]"
_ADD = expand(
    "{a} + {b}[| = ?| =]",
    "{a}+{b}[|=?|=]",
    "{a} plus {b}[|, please]?",
    f"{_CALCULATE} {{a}} [+|plus] {{b}}[|, please].",
    f"{_CALCULATE} {{a}}+{{b}}.",
    f"{_CALCULATE} the sum of {{a}} and {{b}}.",
    "[|Please |Now ][add|add up|sum] {a} and {b}.",
    "[|Please ]add {b} to {a}.",
    "The sum of {a} and {b}[|, please]?",
    "What do [you|I|we] get when [you|I|we] add {a} and {b}?",
    *(
        f"I have {{a}} {things} and I [get|find|buy] {{b}} more. "
        f"How many {things} do I have[| now]?"
        for things in _THINGS
    ),
    *(
        f"There are {{a}} {things} and [then|now] {{b}} more [come|arrive]. How many {things} are "
        "there[| now]?"
        for things in _ANIMALS
    ),
)
_SUBTRACT = expand(
    "{a} - {b}[| = ?| =]",
    "{a}-{b}[|=?|=]",
    "{a} minus {b}[|, please]?",
    f"{_CALCULATE} {{a}} [-|minus] {{b}}[|, please].",
    f"{_CALCULATE} {{a}}-{{b}}.",
    f"{_CALCULATE} the difference [of|between] {{a}} and {{b}}.",
    "[|Please |Now ]subtract {b} from {a}.",
    "[|Please ]take [{b} away from {a}|{b} from {a}|away {b} from {a}].",
    "The difference [of|between] {a} and {b}[|, please]?",
    "What do [you|I|we] get when [you|I|we] [subtract|take] {b} from {a}?",
    *(
        f"I have {{a}} {things} and I [give away|lose|sell] {{b}}. "
        f"How many {things} [do I have|are left|do I have left]?"
        for things in _THINGS
    ),
    *(
        f"There are {{a}} {things} and {{b}} [fly away|leave|go away]. How many {things} are "
        "[there|left]?"
        for things in _ANIMALS
    ),
)


def _choices_of(better: str, word: str) -> tuple[str, ...]:
    """Ways to ask which of two numbers is `better` ('larger', 'smaller' ...)."""
    return expand(
        f"[Which|What|Which one|Which number|What number] is {better}[,|:] {{a}} or {{b}}?",
        f"[Which|Which one|Which number] is [the {better}|the {better} one], {{a}} or {{b}}?",
        f"Is {{a}} or {{b}} [{better}|the {better}|the {better} number|the {better} one]?",
        f"Which is {better} of {{a}} and {{b}}?",
        f"[|Name |Tell me |Give me |Which is |What is ]the {better} [|number |one ]"
        "of {a} and {b}.",
        f"[Name|Tell me|Give me|Find] the {better} [number|one][:|,] {{a}} or {{b}}.",
        f"What is {word}[,|:] {{a}} or {{b}}?",
    )


_LARGER = expand(*_choices_of("[larger|bigger|greater]", "[more|larger]"))
_SMALLER = expand(*_choices_of("[smaller|lower]", "[less|smaller]"))
_PARITY = expand(
    "Is [|the number ]{a} [even or odd|odd or even|an even number|an odd number|even|odd]?",
    "[Even or odd|Odd or even][:|,] {a}?",
    "[Tell me|Do you know|Can you tell me] [whether|if] [|the number ]{a} is [even or odd|odd or "
    "even]?",
    "What is [|the number ]{a}[,|:] [even or odd|odd or even]?",
)


def _operands(rng: random.Random, name: str, split: Split) -> tuple[int, int, str]:
    """Two numbers of one operation, with the key that decides their side."""
    small = rng.random() < 0.5

    def draw() -> tuple[int, int]:
        a, b = rng.randint(0, 20 if small else 99), rng.randint(0, 20 if small else 10)
        if name == "sub":
            return max(a, b), min(a, b)
        return (b, a) if rng.random() < 0.3 else (a, b)

    (a, b), key = draw_operands(draw, lambda pair: f"{name}|{pair[0]}|{pair[1]}", split)
    return a, b, key


_OPERATIONS: dict[str, tuple[str, tuple[str, ...], str, Callable[[int, int], int]]] = {
    "add": ("addition", _ADD, "{a} + {b} = {v}.", lambda a, b: a + b),
    "sub": ("subtraction", _SUBTRACT, "{a} - {b} = {v}.", lambda a, b: a - b),
}


def arithmetic(rng: random.Random, split: Split) -> Turn:
    """Sums and differences with a small operand."""
    name = rng.choices(("add", "sub"), (4, 5))[0]
    category, phrasings, sentence, compute = _OPERATIONS[name]
    a, b, operands = _operands(rng, name, split)
    phrasing, key = pick_phrasing(rng, name, phrasings, split)
    value = str(compute(a, b))
    user = roughen(rng, frame(rng, phrasing.format(a=a, b=b)))
    return Turn(category, user, sentence.format(a=a, b=b, v=value), (key, operands), value)


def comparison(rng: random.Random, split: Split) -> Turn:
    """Which of two numbers is larger or smaller; even or odd."""
    if rng.random() < 0.2:
        number, operands = draw_operands(lambda: rng.randint(0, 99), lambda n: f"parity|{n}", split)
        phrasing, key = pick_phrasing(rng, "parity", _PARITY, split)
        value = "odd" if number % 2 else "even"
        user = roughen(rng, phrasing.format(a=number))
        return Turn("comparison", user, f"{number} is {value}.", (key, operands), value)
    larger = rng.random() < 0.5
    name, phrasings = ("larger", _LARGER) if larger else ("smaller", _SMALLER)

    top = rng.choice((20, 100))

    def draw() -> tuple[int, int]:
        a, b = rng.sample(range(top), 2)
        return a, b

    (a, b), operands = draw_operands(draw, lambda pair: f"compare|{pair[0]}|{pair[1]}", split)
    phrasing, key = pick_phrasing(rng, name, phrasings, split)
    first, second = (max(a, b), min(a, b)) if larger else (min(a, b), max(a, b))
    user = roughen(rng, frame(rng, phrasing.format(a=a, b=b)))
    answer = f"{first} is {name} than {second}."
    return Turn("comparison", user, answer, (key, operands), str(first))


def _letters(word: str) -> str:
    return "-".join(word.upper())


_PLEASE = "[|Please |Can you |Could you |Now ]"
_CAPITALS = "[upper case|upper case letters|capital letters|capitals|all caps]"
_WORD_TASKS: dict[str, tuple[tuple[str, ...], Callable[[str], str]]] = {
    "spell": (
        expand(
            f"{_PLEASE}spell [|out ][|the word ]{{w}}[|, please| for me].",
            "How [do you|do I|do we|can I] spell [|the word ]{w}?",
            "How is [|the word ]{w} spelled?",
            "[What is|Tell me|Give me] the spelling of [|the word ]{w}.",
            "[Tell me|Do you know] how to spell [|the word ]{w}.",
        ),
        _letters,
    ),
    "upper": (
        expand(
            f"{_PLEASE}[write|put] [|the word ]{{w}} [in|into] {_CAPITALS}.",
            f"{_PLEASE}[turn|convert|change] [|the word ]{{w}} [to|into] {_CAPITALS}.",
            f"[What is|Give me|Say] [|the word ]{{w}} in {_CAPITALS}.",
            f"{{w}} in {_CAPITALS}[|, please]?",
        ),
        str.upper,
    ),
    "first": (
        expand(
            "[What is|Which is|Tell me|Name|Give me] the first letter of [|the word ]{w}.",
            "[Which|What] letter does [|the word ]{w} [begin|start] with?",
            "With [which|what] letter does [|the word ]{w} [begin|start]?",
            "[Which|What] letter is the first [|one ][of|in] [|the word ]{w}?",
            "[Which|What] letter [comes first|is first] in [|the word ]{w}?",
        ),
        lambda word: word[0].upper(),
    ),
}


def word_task(rng: random.Random, split: Split) -> Turn:
    """Work on the letters of one word.

    How a word is spelled and written in capitals are facts (as of a capital city), seen under other
    phrasings; for the first letter the word itself is held out.
    """
    name = rng.choices(list(_WORD_TASKS), (3, 4, 2))[0]
    phrasings, compute = _WORD_TASKS[name]
    phrasing, key = pick_phrasing(rng, f"word {name}", phrasings, split)
    keys: tuple[str, ...] = (key,)
    if name == "spell":
        word = rng.choice(WORDS)
    elif name == "upper":
        word = rng.choice(WORDS if rng.random() < 0.3 else VALUES)
    else:
        word, operands = draw_operands(
            lambda: rng.choice(WORDS), lambda w: f"word {name}|{w}", split
        )
        keys = (key, operands)
    quoted = f'"{word}"' if rng.random() < 0.25 else word
    user = roughen(rng, phrasing.format(w=quoted))
    return Turn("words", user, compute(word), keys)


_THESE = "[this list|these words|the list|the words|this|the following]"
_LIST = "[this list|these words|the list|the words|the following list][:|]"
_MAKE = "[Write|Turn|Put|Make|Format|Convert|Please write|Please turn|Can you turn]"


def _ordinal(word: str) -> tuple[str, ...]:
    """Ways to ask for the `word` ('first' or 'last') of a list."""
    return expand(
        f"[What is|Which is|Give me|Name|Tell me|Say|] the {word} [word|item|one] [of|in] {_LIST} "
        "{l}",
        f"[Which|What] [word|item|one|] [comes|is|stands] {word} [in|of] {_LIST} {{l}}",
        f"[Which|What] [word|item|one] [comes|is|stands|is the] {word}: {{l}}",
        f"[Tell me|Give me|Name] the {word} [word|item|one]: {{l}}",
    )


def _made_into(form: str) -> tuple[str, ...]:
    """Ways to ask for a list in a `form` ('bullet' ...)."""
    return expand(
        f"{_MAKE} {_THESE} [as|into] a {form} list: {{l}}",
        f"[Make|Write|Give me|Create|I want|I need] a {form} list [of|from|with] {_THESE}: {{l}}",
        f"[Make|Write|Give me|Create|I want|I need] a {form} list: {{l}}",
        f"A {form} list [of|from|with] {_THESE}: {{l}}",
    )


_LIST_TASKS: dict[str, tuple[tuple[str, ...], Callable[[list[str]], str]]] = {
    "reverse": (
        expand(
            f"{_PLEASE}[reverse|turn around] [|the order of ]{_LIST} {{l}}",
            f"{_PLEASE}[write|put|give me|say|repeat] {_THESE} "
            "[backwards|in reverse|in reverse order]: {l}",
        ),
        lambda items: ", ".join(reversed(items)),
    ),
    "first": (_ordinal("first"), lambda items: items[0]),
    "last": (_ordinal("last"), lambda items: items[-1]),
    "count": (
        expand(
            f"[How many|Count how many|Tell me how many] [words|items] are [|there ]in "
            f"{_LIST} {{l}}",
            "How many [words|items] [are there|are here|does this list have|do you see]: {l}",
            f"{_PLEASE}count [the [words|items] [in|of] |]{_LIST} {{l}}",
            "How long is [this list|the list|the following list][:|] {l}",
            "[What is|Tell me|Give me] the [number of words|number of items|length] [in|of] "
            f"{_LIST} {{l}}",
        ),
        lambda items: str(len(items)),
    ),
    "bullets": (_made_into("[bullet|bulleted]"), lambda items: "\n".join(f"- {i}" for i in items)),
    "numbered": (
        (
            *_made_into("numbered"),
            *expand(f"{_PLEASE}number [the [words|items] [in|of] |]{_LIST} {{l}}"),
        ),
        lambda items: "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1)),
    ),
    "json": (
        _made_into("JSON"),
        lambda items: "[" + ", ".join(f'"{item}"' for item in items) + "]",
    ),
    "repeat": (
        expand(
            f"{_PLEASE}[repeat|say|copy|echo] [after me|{_THESE}]"
            "[| exactly| again| once more]: {l}",
            f"{_PLEASE}[repeat|copy|echo][| exactly]: {{l}}",
        ),
        ", ".join,
    ),
}
_SORT = "[|Please |Can you |Now ][sort|order|arrange]"
_SORT_NUMBERS = expand(
    f"{_SORT} [these|the|the following] numbers[:|] {{l}}",
    f"{_SORT} [these|the|the following] numbers [in order|in rising order|from small to large|by "
    "size]: {l}",
    "[Put|Write|Bring|Please put] [these|the|the following] numbers in [|rising |the right ]order"
    ": {l}",
    "Sort [in rising order|from small to large|by size]: {l}",
    "[Put|Write|Sort|Order] [these|the] numbers from [small to large|the smallest to the largest]: "
    "{l}",
)
_SORT_WORDS = expand(
    f"{_SORT} [these|the|the following] words[:|] {{l}}",
    f"{_SORT} [these|the|the following] words [alphabetically|in alphabetical order|from A to Z|by "
    "the alphabet]: {l}",
    "[Put|Write|Bring|Please put] [these|the|the following] words in [|alphabetical |the right ]"
    "order: {l}",
    "Sort [alphabetically|in alphabetical order|from A to Z|by the alphabet]: {l}",
)


def _random_string(rng: random.Random) -> str:
    """Letters and digits without sense: they can only be copied."""
    alphabet = "abcdefghijklmnopqrstuvwxyz" if rng.random() < 0.7 else "0123456789"
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(2, 4)))


def _list_items(rng: random.Random, name: str) -> list[str]:
    pool = rng.choice((WORDS, WORDS, WORDS, NAMES))
    if name == "repeat" and rng.random() < 0.3:
        return [_random_string(rng) for _ in range(rng.randint(1, 2))]
    low, high = {"count": (2, 5), "repeat": (1, 4)}.get(name, (2, 4))
    return rng.sample(pool, rng.randint(low, high))


def list_task(rng: random.Random, split: Split) -> Turn:
    """Work on a list of words that the user gives."""
    name = rng.choice(list(_LIST_TASKS))
    phrasings, compute = _LIST_TASKS[name]
    items, operands = draw_operands(
        lambda: _list_items(rng, name), lambda i: f"list|{','.join(i)}", split
    )
    phrasing, key = pick_phrasing(rng, f"list {name}", phrasings, split)
    return Turn("lists", phrasing.format(l=", ".join(items)), compute(items), (key, operands))


def sorting(rng: random.Random, split: Split) -> Turn:
    """Sorts three numbers, or three words with different first letters."""
    numbers = rng.random() < 0.6
    phrasings = _SORT_NUMBERS if numbers else _SORT_WORDS

    def draw() -> list[str]:
        if numbers:
            top = rng.choice((10, 100))
            return [str(n) for n in rng.sample(range(top), 3)]
        while True:
            words = rng.sample(WORDS, 3)
            if len({word[0] for word in words}) == len(words):
                return words

    items, operands = draw_operands(draw, lambda i: f"sort|{','.join(i)}", split)
    name = "sort numbers" if numbers else "sort words"
    phrasing, key = pick_phrasing(rng, name, phrasings, split)
    ordered = sorted(items, key=int) if numbers else sorted(items)
    user = phrasing.format(l=", ".join(items))
    return Turn("sorting", user, ", ".join(ordered), (key, operands))


_COUNT = expand(
    f"{_PLEASE}count [|up ]from {{a}} to {{b}}.",
    f"{_PLEASE}[write|list|say|give me|name] [|all ]the numbers [from {{a}} to {{b}}|between {{a}} "
    "and {b}].",
    "[|Please ]start [at|with|from] {a} and count [|up ]to {b}.",
    "Count {a} to {b}.",
    "[Which|What] numbers [are|come] between {a} and {b}?",
)
_COUNT_TO = expand(
    f"{_PLEASE}[count|start counting] [|up |from one ]to {{b}}[|, please].",
    "I [want|would like] you to count [|up |from one ]to {b}.",
)
_ABOUT = expand(
    "[|Please |Can you |Could you ]tell me "
    "[|something |more |some facts |what you know ]about {s}.",
    "[|Please |Can you |Could you ]describe [|the country ]{s}.",
    "[Give me|Write|Say|I want] [some facts|a few facts|a few sentences|something] about {s}.",
    "What [do you know|can you tell me|can you say] about {s}?",
    "I [want|would like] to know [|more |something ]about {s}.",
)
_RECITALS = {
    "days": ("the days of the week", ", ".join(DAYS) + "."),
    "months": ("the months of the year", ", ".join(MONTHS) + "."),
    "planets": ("the planets", ", ".join(PLANETS) + "."),
    "alphabet": ("the letters of the alphabet", " ".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ")),
    "seasons": ("the seasons", "Spring, summer, autumn, winter."),
    "continents": ("the continents", "Africa, America, Antarctica, Asia, Europe, Oceania."),
}
_RECITE = expand(
    "[|Please |Can you |Could you ][list|name|recite|write|write down|tell me|give me] [|all ]{s}.",
    "[What|Which] are [|all ]{s}?",
    "[Do you know|I want to know|I would like to know] [|all ]{s}.",
    "[List|Name|Recite] {s} [for me|in order].",
)


def long_answer(rng: random.Random, split: Split) -> Turn:
    """Answers of several sentences or long enumerations."""
    kind = rng.choices(("count", "about", "recite"), (4, 4, 3))[0]
    if kind == "count":

        def draw() -> tuple[int, int]:
            start = 1 if rng.random() < 0.4 else rng.randint(0, 80)
            return start, start + rng.randint(2, 9)

        (a, b), operands = draw_operands(draw, lambda p: f"count|{p[0]}|{p[1]}", split)
        to_only = a == 1 and rng.random() < 0.4
        name, phrasings = ("count to", _COUNT_TO) if to_only else ("count", _COUNT)
        phrasing, key = pick_phrasing(rng, name, phrasings, split)
        user = roughen(rng, phrasing.format(a=a, b=b))
        answer = ", ".join(str(n) for n in range(a, b + 1)) + "."
        return Turn("long answers", user, answer, (key, operands))
    if kind == "about":
        country = rng.choice(COUNTRIES)
        phrasing, key = pick_phrasing(rng, "about", _ABOUT, split)
        name = country.spoken
        answer = (
            f"{name[0].upper()}{name[1:]} is a country in {country.continent}. "
            f"The capital of {name} is {country.capital}. "
            f"People in {name} speak {country.language}."
        )
        return Turn("long answers", roughen(rng, phrasing.format(s=name)), answer, (key,))
    subject, answer = rng.choice(list(_RECITALS.values()))
    phrasing, key = pick_phrasing(rng, "recite", _RECITE, split)
    return Turn("long answers", roughen(rng, phrasing.format(s=subject)), answer, (key,))
