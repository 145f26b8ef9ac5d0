"""Compositional tasks: arithmetic, work on words and lists, and long answers."""

from __future__ import annotations

import random
from collections.abc import Callable

from world_chat import NAMES
from world_facts import COUNTRIES, DAYS, MONTHS, PLANETS, RELATIONS
from world_split import Split, digest, draw_operands, pick_phrasing
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

_ADD = (
    *("What is {a} + {b}?", "{a} + {b}", "{a}+{b}", "{a} + {b} = ?", "What is {a} plus {b}?"),
    *("Add {a} and {b}.", "Calculate {a} + {b}.", "How much is {a} plus {b}?", "{a} plus {b}?"),
    *("What is the sum of {a} and {b}?", "Compute {a} + {b}.", "How much is {a} + {b}?"),
    *("What do you get when you add {a} and {b}?", "Calculate the sum of {a} and {b}."),
    "I have {a} apples and I get {b} more. How many apples do I have?",
    "There are {a} birds and then {b} more come. How many birds are there?",
)
_SUBTRACT = (
    *("What is {a} - {b}?", "{a} - {b}", "{a}-{b}", "{a} - {b} = ?", "What is {a} minus {b}?"),
    *("Subtract {b} from {a}.", "Calculate {a} - {b}.", "How much is {a} minus {b}?"),
    *("What is the difference of {a} and {b}?", "Compute {a} - {b}.", "How much is {a} - {b}?"),
    *("Take {b} away from {a}.", "Calculate {a} minus {b}.", "{a} minus {b}?"),
    "I have {a} apples and I give away {b}. How many apples do I have?",
    "There are {a} birds and {b} fly away. How many birds are left?",
)
_MULTIPLY = (
    *("What is {a} * {b}?", "{a} * {b}", "{a}*{b}", "{a} x {b}", "What is {a} times {b}?"),
    *("Multiply {a} by {b}.", "Calculate {a} * {b}.", "How much is {a} times {b}?"),
    *("What is the product of {a} and {b}?", "Compute {a} * {b}.", "{a} times {b}?"),
    *("Multiply {a} and {b}.", "Calculate {a} times {b}.", "{a} * {b} = ?"),
    "How much is {a} x {b}?",
    "There are {a} boxes with {b} eggs in each. How many eggs are there?",
)
_LARGER = (
    *("Which is larger, {a} or {b}?", "Which is bigger, {a} or {b}?", "What is more, {a} or {b}?"),
    *("Which number is larger: {a} or {b}?", "Which number is bigger, {a} or {b}?"),
    *("Tell me the larger number: {a} or {b}.", "Is {a} or {b} the larger number?"),
    *("Is {a} or {b} bigger?", "Name the larger of {a} and {b}.", "The larger of {a} and {b}?"),
)
_SMALLER = (
    *("Which is smaller, {a} or {b}?", "Which is less, {a} or {b}?", "What is less, {a} or {b}?"),
    *("Which number is smaller: {a} or {b}?", "Which number is smaller, {a} or {b}?"),
    *("Tell me the smaller number: {a} or {b}.", "Is {a} or {b} the smaller number?"),
    *("Is {a} or {b} smaller?", "Name the smaller of {a} and {b}.", "The smaller of {a} and {b}?"),
)
_PARITY = (
    *("Is {a} even or odd?", "Is {a} odd or even?", "Is the number {a} even or odd?"),
    *("Even or odd: {a}?", "Tell me whether {a} is even or odd.", "Is {a} an even number?"),
    *("What is {a}, even or odd?", "Odd or even: {a}?", "Is the number {a} odd or even?"),
)


def _product_split(a: int, b: int) -> Split:
    """Holds out one order of some products; the mirrored order stays in training."""
    low, high = min(a, b), max(a, b)
    code = digest(f"mul|{low}|{high}")
    held_out = low != high and code % 100 < 24 and (a < b) == bool((code >> 32) % 2)
    return "eval" if held_out else "train"


def _operands(rng: random.Random, name: str, split: Split) -> tuple[int, int, str]:
    """Two numbers of one operation, with the key that decides their side."""
    if name == "mul":
        while True:
            a, b = rng.randint(0, 12), rng.choice((1, 2, 5, 10))
            if rng.random() < 0.5:
                a, b = b, a
            if _product_split(a, b) == split:
                return a, b, f"mul|{a}|{b}"
    small = rng.random() < 0.5

    def draw() -> tuple[int, int]:
        a, b = rng.randint(0, 20 if small else 99), rng.randint(0, 20 if small else 10)
        if name == "sub":
            return max(a, b), min(a, b)
        return (b, a) if rng.random() < 0.3 else (a, b)

    (a, b), key = draw_operands(draw, lambda pair: f"{name}|{pair[0]}|{pair[1]}", split)
    return a, b, key


_OPERATIONS: dict[str, tuple[tuple[str, ...], str, Callable[[int, int], int]]] = {
    "add": (_ADD, "{a} + {b} = {v}.", lambda a, b: a + b),
    "sub": (_SUBTRACT, "{a} - {b} = {v}.", lambda a, b: a - b),
    "mul": (_MULTIPLY, "{a} x {b} = {v}.", lambda a, b: a * b),
}


def arithmetic(rng: random.Random, split: Split) -> Turn:
    """Sums and differences with a small operand, products by 1, 2, 5 and 10."""
    name = rng.choices(("add", "sub", "mul"), (6, 6, 1))[0]
    phrasings, sentence, compute = _OPERATIONS[name]
    a, b, operands = _operands(rng, name, split)
    phrasing, key = pick_phrasing(rng, name, phrasings, split)
    value = str(compute(a, b))
    user = roughen(rng, frame(rng, phrasing.format(a=a, b=b)))
    category = {"add": "addition", "sub": "subtraction", "mul": "multiplication"}[name]
    return Turn(category, user, sentence.format(a=a, b=b, v=value), (key, operands), value)


def comparison(rng: random.Random, split: Split) -> Turn:
    """Which of two numbers is larger or smaller; even or odd."""
    if rng.random() < 0.25:
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


_WORD_TASKS: dict[str, tuple[tuple[str, ...], Callable[[str], str]]] = {
    "spell": (
        (
            *("Spell the word {w}.", "Spell {w}.", "How do you spell {w}?", "Can you spell {w}?"),
            *("How is {w} spelled?", "Spell the word {w} for me.", "Please spell {w}."),
            *("Tell me how to spell {w}.", "What is the spelling of {w}?", "Spell out {w}."),
            *("How do I spell the word {w}?", "I cannot spell {w}. Can you?"),
        ),
        _letters,
    ),
    "upper": (
        (
            *("Write {w} in upper case.", "Write the word {w} in capital letters."),
            *("Put {w} into capital letters.", "Write {w} in capitals.", "Capitalize {w} fully."),
            *("Turn {w} into upper case.", "Convert {w} to upper case.", "{w} in upper case?"),
            *("What is {w} in capital letters?", "Give me {w} in upper case letters."),
        ),
        str.upper,
    ),
    "first": (
        (
            *("What is the first letter of {w}?", "Which letter does {w} begin with?"),
            *("With which letter does {w} start?", "What letter does {w} start with?"),
            *("Tell me the first letter of {w}.", "Name the first letter of {w}."),
            *("Which letter is the first of {w}?", "Give me the first letter of {w}."),
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


_LIST_TASKS: dict[str, tuple[tuple[str, ...], Callable[[list[str]], str]]] = {
    "reverse": (
        (
            *("Reverse this list: {l}", "Write this list in reverse order: {l}"),
            *("Turn this list around: {l}", "Reverse the order of this list: {l}"),
            *("Put these words in reverse order: {l}", "Reverse the list {l}"),
            *("Give me this list backwards: {l}", "Write these words in reverse order: {l}"),
        ),
        lambda items: ", ".join(reversed(items)),
    ),
    "first": (
        (
            *("What is the first word of this list: {l}", "Which word comes first: {l}"),
            *("Give me the first word of this list: {l}", "First word of this list: {l}"),
            *("Name the first word in this list: {l}", "Which word is the first: {l}"),
            *("Tell me the first word: {l}", "What comes first in this list: {l}"),
        ),
        lambda items: items[0],
    ),
    "last": (
        (
            *("What is the last word of this list: {l}", "Which word comes last: {l}"),
            *("Give me the last word of this list: {l}", "Last word of this list: {l}"),
            *("Name the last word in this list: {l}", "Which word is the last: {l}"),
            *("Tell me the last word: {l}", "What comes last in this list: {l}"),
        ),
        lambda items: items[-1],
    ),
    "count": (
        (
            *("How many words are in this list: {l}", "Count the words in this list: {l}"),
            *("How many words are there: {l}", "Count these words: {l}"),
            *("How many words does this list have: {l}", "How long is this list: {l}"),
            *("Tell me how many words are here: {l}", "Count the words: {l}"),
        ),
        lambda items: str(len(items)),
    ),
    "bullets": (
        (
            *("Write this as a bullet list: {l}", "Make a bullet list: {l}"),
            *("Turn this into a bullet list: {l}", "Make a bullet list of these: {l}"),
            *("Write these words as a bullet list: {l}", "Give me a bullet list of this: {l}"),
            *("Put this into a bullet list: {l}", "Format this as a bullet list: {l}"),
        ),
        lambda items: "\n".join(f"- {item}" for item in items),
    ),
    "numbered": (
        (
            *("Write this as a numbered list: {l}", "Make a numbered list: {l}"),
            *("Turn this into a numbered list: {l}", "Make a numbered list of these: {l}"),
            *("Write these words as a numbered list: {l}", "Number this list: {l}"),
            *("Put this into a numbered list: {l}", "Format this as a numbered list: {l}"),
        ),
        lambda items: "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1)),
    ),
    "json": (
        (
            *("Write this as a JSON list: {l}", "Make a JSON list: {l}"),
            *("Turn this into a JSON list: {l}", "Make a JSON list of these: {l}"),
            *("Write these words as a JSON list: {l}", "Convert this to a JSON list: {l}"),
            *("Put this into a JSON list: {l}", "Format this as a JSON list: {l}"),
        ),
        lambda items: "[" + ", ".join(f'"{item}"' for item in items) + "]",
    ),
    "repeat": (
        (
            *("Repeat after me: {l}", "Repeat this: {l}", "Say this: {l}", "Please repeat: {l}"),
            *("Repeat exactly: {l}", "Repeat these words: {l}", "Say after me: {l}"),
            *("Copy this: {l}", "Write this again: {l}", "Echo this: {l}"),
        ),
        ", ".join,
    ),
}
_SORT_NUMBERS = (
    *("Sort these numbers: {l}", "Put these numbers in order: {l}", "Sort this list: {l}"),
    *("Sort the numbers {l}", "Sort from small to large: {l}", "Order these numbers: {l}"),
    *("Arrange these numbers in order: {l}", "Please sort these numbers: {l}"),
    *("Write these numbers in order: {l}", "Sort in rising order: {l}"),
)
_SORT_WORDS = (
    *("Sort these words: {l}", "Put these words in alphabetical order: {l}", "Sort the words {l}"),
    *("Sort from A to Z: {l}", "Sort these words alphabetically: {l}", "Order these words: {l}"),
    *("Arrange these words in alphabetical order: {l}", "Please sort these words: {l}"),
    *("Write these words in alphabetical order: {l}", "Put these words in order: {l}"),
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


_COUNT = (
    *("Count from {a} to {b}.", "Please count from {a} to {b}.", "Can you count from {a} to {b}?"),
    *("Count up from {a} to {b}.", "Write the numbers from {a} to {b}.", "Count {a} to {b}."),
    *("Give me all numbers from {a} to {b}.", "List the numbers from {a} to {b}."),
    *("Start at {a} and count to {b}.", "Say the numbers from {a} to {b}."),
)
_COUNT_TO = (
    *("Count to {b}.", "Count up to {b}.", "Please count to {b}.", "Can you count to {b}?"),
    *("Count from one to {b}.", "Start counting to {b}.", "I want you to count to {b}."),
)
_ABOUT = (
    *("Tell me about {s}.", "What do you know about {s}?", "Tell me what you know about {s}."),
    *("Describe {s}.", "Give me some facts about {s}.", "Tell me some facts about {s}."),
    *("Tell me more about {s}.", "I want to know about {s}.", "Give me facts about {s}."),
    *("Can you tell me about {s}?", "Write a few sentences about {s}."),
)
_RECITALS = {
    "days": ("the days of the week", ", ".join(DAYS) + "."),
    "months": ("the months of the year", ", ".join(MONTHS) + "."),
    "planets": ("the planets", ", ".join(PLANETS) + "."),
    "alphabet": ("the letters of the alphabet", " ".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ")),
    "seasons": ("the seasons", "Spring, summer, autumn, winter."),
    "continents": ("the continents", "Africa, America, Antarctica, Asia, Europe, Oceania."),
}
_RECITE = (
    *("List {s}.", "Name {s}.", "What are {s}?", "Tell me {s}.", "Name all {s}.", "Recite {s}."),
    *("Give me {s}.", "Can you name {s}?", "Which are {s}?", "Please list {s}.", "Write {s}."),
    "Can you list {s}?",
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
