"""The facts of the closed world: tables, and the ways to ask for and to state each of them."""

from __future__ import annotations

from dataclasses import dataclass

# country: capital, continent, language
_COUNTRIES = """
France: Paris, Europe, French
Spain: Madrid, Europe, Spanish
Italy: Rome, Europe, Italian
Germany: Berlin, Europe, German
Portugal: Lisbon, Europe, Portuguese
Austria: Vienna, Europe, German
Poland: Warsaw, Europe, Polish
Greece: Athens, Europe, Greek
Sweden: Stockholm, Europe, Swedish
Norway: Oslo, Europe, Norwegian
Denmark: Copenhagen, Europe, Danish
Finland: Helsinki, Europe, Finnish
Hungary: Budapest, Europe, Hungarian
Ireland: Dublin, Europe, English
England: London, Europe, English
Russia: Moscow, Europe, Russian
Ukraine: Kyiv, Europe, Ukrainian
Romania: Bucharest, Europe, Romanian
Bulgaria: Sofia, Europe, Bulgarian
Croatia: Zagreb, Europe, Croatian
Serbia: Belgrade, Europe, Serbian
Czechia: Prague, Europe, Czech
Belgium: Brussels, Europe, Dutch
Netherlands: Amsterdam, Europe, Dutch
Iceland: Reykjavik, Europe, Icelandic
Turkey: Ankara, Asia, Turkish
China: Beijing, Asia, Chinese
Japan: Tokyo, Asia, Japanese
India: Delhi, Asia, Hindi
Thailand: Bangkok, Asia, Thai
Vietnam: Hanoi, Asia, Vietnamese
Iran: Tehran, Asia, Persian
Iraq: Baghdad, Asia, Arabic
Israel: Jerusalem, Asia, Hebrew
Mongolia: Ulaanbaatar, Asia, Mongolian
Nepal: Kathmandu, Asia, Nepali
Egypt: Cairo, Africa, Arabic
Kenya: Nairobi, Africa, Swahili
Morocco: Rabat, Africa, Arabic
Ghana: Accra, Africa, English
Nigeria: Abuja, Africa, English
Senegal: Dakar, Africa, French
Canada: Ottawa, America, English
Mexico: Mexico City, America, Spanish
Brazil: Brasilia, America, Portuguese
Argentina: Buenos Aires, America, Spanish
Chile: Santiago, America, Spanish
Peru: Lima, America, Spanish
Cuba: Havana, America, Spanish
Colombia: Bogota, America, Spanish
Australia: Canberra, Oceania, English
"""

_COLOURS = """
the sky: blue; grass: green; snow: white; coal: black; blood: red; the sun: yellow;
a banana: yellow; a lemon: yellow; a tomato: red; a carrot: orange; a leaf: green; milk: white;
chocolate: brown; a frog: green; a flamingo: pink; an elephant: grey; a plum: purple; ink: black;
salt: white; a crow: black; a cucumber: green; a pumpkin: orange; a cherry: red; the sea: blue;
a polar bear: white; honey: golden; cotton: white; a lime: green; a strawberry: red; mud: brown
"""

_OPPOSITES = """
hot: cold; big: small; fast: slow; high: low; light: dark; good: bad; new: old; happy: sad;
open: closed; full: empty; early: late; left: right; up: down; in: out; wet: dry; hard: soft;
long: short; rich: poor; strong: weak; clean: dirty; loud: quiet; day: night; yes: no; war: peace;
true: false; first: last; thick: thin; wide: narrow; young: aged; heavy: weightless; love: hate;
near: far; above: below; inside: outside; win: lose; push: pull; buy: sell; start: stop; front: back
"""

_LEGS = """
a dog: four; a cat: four; a spider: eight; a bird: two; an ant: six; a horse: four; a human: two;
a snake: zero; a cow: four; a bee: six; a fish: zero; a duck: two; a fly: six; a sheep: four;
a chicken: two; a scorpion: eight; a beetle: six; a worm: zero; a lion: four; an eagle: two
"""

_SOUNDS = """
a dog: woof; a cat: meow; a cow: moo; a duck: quack; a sheep: baa; a pig: oink; a bee: buzz;
a snake: hiss; a frog: croak; a lion: roar; a horse: neigh; an owl: hoot; a mouse: squeak;
a crow: caw; a rooster: crow; a wolf: howl
"""

_BABIES = """
a dog: puppy; a cat: kitten; a cow: calf; a sheep: lamb; a horse: foal; a duck: duckling;
a chicken: chick; a bear: cub; a goat: kid; a pig: piglet; a frog: tadpole; a goose: gosling;
a swan: cygnet; a kangaroo: joey; a deer: fawn
"""

_KINDS = """
apple: fruit; pear: fruit; banana: fruit; cherry: fruit; grape: fruit; mango: fruit; peach: fruit;
carrot: vegetable; onion: vegetable; potato: vegetable; cabbage: vegetable; spinach: vegetable;
dog: animal; cat: animal; horse: animal; lion: animal; tiger: animal; rabbit: animal; wolf: animal;
red: colour; blue: colour; green: colour; purple: colour; pink: colour; brown: colour;
hammer: tool; saw: tool; drill: tool; piano: instrument; violin: instrument; guitar: instrument;
flute: instrument; oak: tree; pine: tree; birch: tree; maple: tree; rose: flower; tulip: flower;
daisy: flower; lily: flower; iron: metal; gold: metal; silver: metal; copper: metal;
car: vehicle; bus: vehicle; train: vehicle; bicycle: vehicle; shirt: garment; coat: garment;
sock: garment; football: sport; tennis: sport; chess: game; poker: game
"""

_SHAPES = """
a triangle: three; a square: four; a rectangle: four; a pentagon: five; a hexagon: six;
an octagon: eight; a circle: zero; a heptagon: seven; a decagon: ten
"""

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
)
PLANETS = ("Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune")
ORDINALS = (
    *("first", "second", "third", "fourth", "fifth", "sixth", "seventh"),
    *("eighth", "ninth", "tenth", "eleventh", "twelfth"),
)
NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
    *("eighteen", "nineteen", "twenty"),
)


def _table(text: str) -> dict[str, str]:
    """Reads 'a: b; c: d' into a dictionary."""
    entries = (entry.strip() for entry in text.replace("\n", " ").split(";"))
    return dict(entry.split(": ") for entry in entries if entry)


def _both_ways(table: dict[str, str]) -> dict[str, str]:
    return table | {value: key for key, value in table.items()}


@dataclass(frozen=True)
class Country:
    """One row of the table of countries."""

    name: str
    capital: str
    continent: str
    language: str

    @property
    def spoken(self) -> str:
        """The name as it stands inside a sentence."""
        return f"the {self.name}" if self.name == "Netherlands" else self.name


COUNTRIES = tuple(
    Country(name, *rest.split(", "))
    for name, rest in (line.split(": ") for line in _COUNTRIES.strip().splitlines())
)


@dataclass(frozen=True)
class Relation:
    """One kind of fact. `{s}` stands for the subject, `{v}` for the value."""

    name: str
    pairs: dict[str, str]
    sentence: str
    questions: tuple[str, ...]
    statements: tuple[str, ...] = ()  # openings of plain text, which the value continues
    follow_ups: tuple[str, ...] = ("And {s}?", "What about {s}?", "And what about {s}?")

    def answer(self, subject: str) -> str:
        """The full sentence that states the fact."""
        text = self.sentence.format(s=subject, v=self.pairs[subject])
        return text[0].upper() + text[1:]


def _steps(names: tuple[str, ...], step: int) -> dict[str, str]:
    return {name: names[(i + step) % len(names)] for i, name in enumerate(names)}


def _capital_relations() -> list[Relation]:
    return [
        Relation(
            "capital",
            {c.spoken: c.capital for c in COUNTRIES},
            "The capital of {s} is {v}.",
            (
                "What is the capital of {s}?",
                "What's the capital of {s}?",
                "Which city is the capital of {s}?",
                "Name the capital of {s}.",
                "Tell me the capital of {s}.",
                "What is the name of the capital of {s}?",
                "What is the capital city of {s}?",
                "Which city is the capital city of {s}?",
                "{s} has which capital?",
                "The capital of {s}?",
                "Do you know the capital of {s}?",
                "Can you tell me the capital of {s}?",
                "I would like to know the capital of {s}.",
                "Give me the capital of {s}.",
                "What city is {s}'s capital?",
            ),
            (
                "The capital of {s} is",
                "The capital city of {s} is",
                "The name of the capital of {s} is",
                "As everyone knows, the capital of {s} is",
                "In {s}, the capital is",
            ),
            ("And of {s}?", "And {s}?", "What about {s}?", "And the capital of {s}?"),
        ),
        Relation(
            "capital_of",
            {c.capital: c.spoken for c in COUNTRIES},
            "{s} is the capital of {v}.",
            (
                "{s} is the capital of which country?",
                "Which country has the capital {s}?",
                "Which country has {s} as its capital?",
                "What country is {s} the capital of?",
                "Of which country is {s} the capital?",
                "Tell me which country has the capital {s}.",
                "Name the country whose capital is {s}.",
                "Whose capital is {s}?",
                "In which country is {s} the capital?",
                "Which country is {s} the capital of?",
            ),
            ("{s} is the capital of", "The city of {s} is the capital of", "{s}, the capital of"),
        ),
    ]


def _country_relations() -> list[Relation]:
    return [
        Relation(
            "continent",
            {c.spoken: c.continent for c in COUNTRIES},
            "{s} is in {v}.",
            (
                "Which continent is {s} in?",
                "On which continent is {s}?",
                "What continent is {s} on?",
                "What continent is {s} in?",
                "Name the continent of {s}.",
                "Tell me the continent of {s}.",
                "On what continent does {s} lie?",
                "Which continent does {s} belong to?",
                "To which continent does {s} belong?",
                "In which continent can I find {s}?",
            ),
            ("{s} is a country in", "The country {s} lies in", "The continent of {s} is"),
        ),
        Relation(
            "language",
            {c.spoken: c.language for c in COUNTRIES},
            "People in {s} speak {v}.",
            (
                "Which language do people speak in {s}?",
                "What language is spoken in {s}?",
                "Which language is spoken in {s}?",
                "What language do they speak in {s}?",
                "What do people speak in {s}?",
                "What is the language of {s}?",
                "Name the language of {s}.",
                "Tell me the language of {s}.",
                "What is the main language in {s}?",
                "Which language do the people of {s} speak?",
            ),
            ("People in {s} speak", "The language of {s} is", "In {s}, people speak"),
        ),
    ]


def _thing_relations() -> list[Relation]:
    return [
        Relation(
            "colour",
            _table(_COLOURS),
            "The colour of {s} is {v}.",
            (
                "What colour is {s}?",
                "What color is {s}?",
                "Which colour does {s} have?",
                "Which colour is {s}?",
                "What is the colour of {s}?",
                "What is the color of {s}?",
                "Tell me the colour of {s}.",
                "Name the colour of {s}.",
                "What colour does {s} have?",
                "Do you know the colour of {s}?",
            ),
            ("The colour of {s} is", "The color of {s} is", "Everyone knows: the colour of {s} is"),
        ),
        Relation(
            "opposite",
            _both_ways(_table(_OPPOSITES)),
            "The opposite of {s} is {v}.",
            (
                "What is the opposite of {s}?",
                "What's the opposite of {s}?",
                "Give me the opposite of {s}.",
                "Name the opposite of {s}.",
                "Tell me the opposite of {s}.",
                "Which word is the opposite of {s}?",
                "Opposite of {s}?",
                "What word means the opposite of {s}?",
                "The opposite of {s}?",
                "Find the opposite of {s}.",
            ),
            ("The opposite of {s} is", "The word that is the opposite of {s} is"),
            ("And of {s}?", "And {s}?", "What about {s}?", "And the opposite of {s}?"),
        ),
        Relation(
            "kind",
            _table(_KINDS),
            "The word {s} names a kind of {v}.",
            (
                "What kind of thing is {s}?",
                "What is {s} a kind of?",
                "To which kind of thing does the word {s} belong?",
                "What does the word {s} name?",
                "Of which kind is {s}?",
                "Tell me what kind of thing {s} is.",
                "Which kind of thing does {s} belong to?",
                "What sort of thing is {s}?",
                "What kind of thing does the word {s} name?",
                "Name the kind of thing that {s} is.",
            ),
            ("The word {s} names a kind of",),
        ),
        Relation(
            "sides",
            _table(_SHAPES),
            "The number of sides of {s} is {v}.",
            (
                "How many sides does {s} have?",
                "How many sides has {s}?",
                "What is the number of sides of {s}?",
                "Tell me how many sides {s} has.",
                "Count the sides of {s}.",
                "Give me the number of sides of {s}.",
                "Do you know how many sides {s} has?",
                "What number of sides does {s} have?",
            ),
            ("The number of sides of {s} is",),
        ),
    ]


def _animal_relations() -> list[Relation]:
    return [
        Relation(
            "legs",
            _table(_LEGS),
            "The number of legs of {s} is {v}.",
            (
                "How many legs does {s} have?",
                "How many legs has {s}?",
                "What is the number of legs of {s}?",
                "Tell me how many legs {s} has.",
                "Count the legs of {s}.",
                "Give me the number of legs of {s}.",
                "Do you know how many legs {s} has?",
                "What number of legs does {s} have?",
                "On how many legs does {s} stand?",
            ),
            ("The number of legs of {s} is",),
        ),
        Relation(
            "sound",
            _table(_SOUNDS),
            "The sound of {s} is {v}.",
            (
                "What sound does {s} make?",
                "Which sound does {s} make?",
                "What is the sound of {s}?",
                "Tell me the sound of {s}.",
                "How does {s} sound?",
                "What noise does {s} make?",
                "Which noise does {s} make?",
                "Name the sound that {s} makes.",
            ),
            ("The sound of {s} is",),
        ),
        Relation(
            "baby",
            _table(_BABIES),
            "The young of {s} is called a {v}.",
            (
                "What is the young of {s} called?",
                "What do you call the young of {s}?",
                "What is the name for the young of {s}?",
                "What is the baby of {s} called?",
                "What do you call the baby of {s}?",
                "Tell me what the young of {s} is called.",
                "Name the young of {s}.",
                "Give me the word for the young of {s}.",
            ),
            ("The young of {s} is called a", "The baby of {s} is called a"),
        ),
    ]


def _word_relations() -> list[Relation]:
    return [
        Relation(
            "number_word",
            {str(i): word for i, word in enumerate(NUMBER_WORDS)},
            "The number {s} in words is {v}.",
            (
                "Write {s} in words.",
                "Write the number {s} in words.",
                "What is {s} in words?",
                "How do you write {s} in words?",
                "Give me the number {s} in words.",
                "Put the number {s} into words.",
                "Tell me the word for {s}.",
                "Which word stands for the number {s}?",
            ),
            ("The number {s} in words is",),
        ),
    ]


def _order_questions(unit: str, side: str) -> tuple[str, ...]:
    return (
        f"Which {unit} comes {side} {{s}}?",
        f"What {unit} comes {side} {{s}}?",
        f"What is the {unit} {side} {{s}}?",
        f"Which {unit} is {side} {{s}}?",
        f"Tell me the {unit} {side} {{s}}.",
        f"Name the {unit} {side} {{s}}.",
        f"What {unit} is {side} {{s}}?",
        f"Give me the {unit} that comes {side} {{s}}.",
    )


def _order_relations() -> list[Relation]:
    relations = []
    cycles: dict[str, tuple[str, ...]] = {"day": DAYS, "month": MONTHS}
    for unit, names in cycles.items():
        for side, step in (("after", 1), ("before", -1)):
            sentence = f"The {unit} {side} {{s}} is {{v}}."
            relations.append(
                Relation(
                    f"{unit}_{side}",
                    _steps(names, step),
                    sentence,
                    _order_questions(unit, side),
                    (f"The {unit} {side} {{s}} is",),
                )
            )
    ranked: dict[str, tuple[str, ...]] = {
        "month of the year": MONTHS,
        "planet from the sun": PLANETS,
    }
    for unit, names in ranked.items():
        relations.append(
            Relation(
                f"nth_{unit.split()[0]}",
                dict(zip(ORDINALS, names, strict=False)),
                f"The {{s}} {unit} is {{v}}.",
                (
                    f"What is the {{s}} {unit}?",
                    f"Which is the {{s}} {unit}?",
                    f"What's the {{s}} {unit}?",
                    f"Name the {{s}} {unit}.",
                    f"Tell me the {{s}} {unit}.",
                    f"Give me the {{s}} {unit}.",
                    f"Do you know the {{s}} {unit}?",
                    f"Can you name the {{s}} {unit}?",
                ),
                (f"The {{s}} {unit} is",),
                ("And the {s}?", "What about the {s}?", "And what about the {s}?"),
            )
        )
    return relations


RELATIONS: tuple[Relation, ...] = (
    *_capital_relations(),
    *_country_relations(),
    *_thing_relations(),
    *_animal_relations(),
    *_word_relations(),
    *_order_relations(),
)
