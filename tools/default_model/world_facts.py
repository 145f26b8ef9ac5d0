"""The facts of the closed world: tables, and the ways to ask for and to state each of them."""

from __future__ import annotations

from dataclasses import dataclass

from world_split import expand

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
    statements: tuple[str, ...]  # openings of plain text, which the value continues
    follow_ups: tuple[str, ...]

    def answer(self, subject: str) -> str:
        """The full sentence that states the fact."""
        text = self.sentence.format(s=subject, v=self.pairs[subject])
        return text[0].upper() + text[1:]


_ASK = "[What is|What's|Do you know|Can you tell me|Could you tell me|Please tell me]"
_TELL = "[Tell me|Name|Give me|Please name|I want to know|I would like to know]"
_STATED = (
    "[|As everyone knows, |Everyone knows that |It is true that |I know that |We know that "
    "|As we all know, |It is known that ]"
)
_FOLLOW = (
    "[And|What about|And what about|How about|And how about|Now|And now] {s}[|, please| then]?",
)


def _relation(
    name: str,
    pairs: dict[str, str],
    sentence: str,
    asked: str,
    *questions: str,
    also: tuple[str, ...] = (),
    statements: tuple[str, ...] = (),
) -> Relation:
    """A relation whose value is called `asked`; further grammars ask in other ways."""
    opening = sentence[: sentence.index(" {v}")]
    openings = (opening, *statements)
    lowered = (o if o.startswith("{") else o[0].lower() + o[1:] for o in openings)
    return Relation(
        name,
        pairs,
        sentence,
        expand(f"{_ASK} {asked}?", f"{_TELL} {asked}.", *questions),
        expand(*(f"{_STATED}{text}[| of course| always]" for text in lowered)),
        expand(*_FOLLOW, *also),
    )


def _steps(names: tuple[str, ...], step: int) -> dict[str, str]:
    return {name: names[(i + step) % len(names)] for i, name in enumerate(names)}


def _country_relations() -> list[Relation]:
    return [
        _relation(
            "capital",
            {c.spoken: c.capital for c in COUNTRIES},
            "The capital of {s} is {v}.",
            "the [|name of the ]capital [|city ]of {s}",
            "[Which|What] city is the capital [|city ]of {s}?",
            "[And the|The] capital [|city ]of {s}?",
            "{s} has [which|what] capital[| city]?",
            also=("And [|the capital ]of {s}[|, please]?", "[What about|And] the capital of {s}?"),
            statements=("The [capital city|name of the capital] of {s} is",),
        ),
        _relation(
            "capital_of",
            {c.capital: c.spoken for c in COUNTRIES},
            "{s} is the capital of {v}.",
            "the country [whose capital is {s}|that has the capital {s}]",
            "{s} is the capital of [which|what] country?",
            "[Which|What] country has [the capital {s}|{s} as its capital]?",
            "[Which|What] country is {s} the capital of?",
            "[Of|In] [which|what] country is {s} the capital?",
            "[Tell me|I want to know|Do you know] which country has the capital {s}.",
            statements=("{s}, the capital of", "[|The city of ]{s} is the capital [|city ]of"),
        ),
        _relation(
            "continent",
            {c.spoken: c.continent for c in COUNTRIES},
            "{s} is in {v}.",
            "the continent [of|that] {s}[| is on| is in| lies on| belongs to]",
            "[Which|What] continent [is {s} [in|on]|does {s} [lie on|lie in|belong to]]?",
            "[On|In] [which|what] continent [is {s}|does {s} lie|can I find {s}]?",
            "To [which|what] continent does {s} belong?",
            statements=("{s} is a country in", "The [country|land] {s} [lies|is] in"),
        ),
        _relation(
            "language",
            {c.spoken: c.language for c in COUNTRIES},
            "People in {s} speak {v}.",
            "the [|main ]language [of|in|spoken in] {s}",
            "[Which|What] [|main ]language [is spoken|do people speak|do they speak] in {s}?",
            "[Which|What] language do [|the ]people [of|in|from] {s} speak?",
            "What do [people|they] speak in {s}?",
            statements=("The [|main ]language [of|in] {s} is", "In {s}, [people|they] speak"),
        ),
    ]


def _thing_relations() -> list[Relation]:
    return [
        _relation(
            "colour",
            _table(_COLOURS),
            "The colour of {s} is {v}.",
            "the [colour|color] of {s}",
            "[What|Which] [colour|color] [is {s}|does {s} have|has {s}]?",
            also=("And the [colour|color] of {s}?", "And of {s}[|, please]?"),
            statements=("The color of {s} is",),
        ),
        _relation(
            "opposite",
            _both_ways(_table(_OPPOSITES)),
            "The opposite of {s} is {v}.",
            "the opposite of [|the word ]{s}",
            "[What|Which] word [is|means] the opposite of {s}?",
            "[|Find |The ]opposite of [|the word ]{s}[|, please]?",
            also=(
                "And [|the opposite ]of {s}[|, please]?",
                "[What about|And] the opposite of {s}?",
            ),
            statements=("The word that [is|means] the opposite of {s} is",),
        ),
        _relation(
            "kind",
            _table(_KINDS),
            "The word {s} names a kind of {v}.",
            "the [kind|sort] of thing that [|the word ]{s} [is|names]",
            "[Tell me|Do you know|Can you tell me] what [kind|sort] of thing {s} is?",
            "[What|Which] [kind|sort] of thing is {s}?",
            "[What|Which] [kind|sort] of thing does the word {s} [name|mean]?",
            "[To which|Which] [kind|sort] of thing does [|the word ]{s} belong[| to]?",
            "What is {s} a [kind|sort] of?",
        ),
        _relation(
            "sides",
            _table(_SHAPES),
            "The number of sides of {s} is {v}.",
            "the number of sides [of {s}|that {s} has]",
            "How many sides [does {s} have|has {s}|are there in {s}]?",
            "[Tell me|Do you know|I want to know] how many sides {s} has.",
            "[Count|Please count] the sides of {s}.",
        ),
    ]


def _animal_relations() -> list[Relation]:
    return [
        _relation(
            "legs",
            _table(_LEGS),
            "The number of legs of {s} is {v}.",
            "the number of legs [of {s}|that {s} has]",
            "How many legs [does {s} have|has {s}]?",
            "[Tell me|Do you know|I want to know] how many legs {s} has.",
            "[Count|Please count] the legs of {s}.",
            "On how many legs does {s} [stand|walk]?",
        ),
        _relation(
            "sound",
            _table(_SOUNDS),
            "The sound of {s} is {v}.",
            "the [sound|noise] [of {s}|that {s} makes]",
            "[What|Which] [sound|noise] [does {s} make|is made by {s}]?",
            "[How does|What does] {s} sound[| like]?",
        ),
        _relation(
            "baby",
            _table(_BABIES),
            "The young of {s} is called a {v}.",
            "the [name|word] for the [young|baby] of {s}",
            "[Tell me|Do you know|Can you tell me] what the [young|baby] of {s} is called?",
            "What is the [young|baby] of {s} called?",
            "[What do you|How do you|How do people] call the [young|baby] of {s}?",
            "Name the [young|baby] of {s}.",
            statements=("The baby of {s} is called a",),
        ),
        _relation(
            "number_word",
            {str(i): word for i, word in enumerate(NUMBER_WORDS)},
            "The number {s} in words is {v}.",
            "[|the number ]{s} in words",
            "[Write|Put|Please write] [|the number ]{s} [in|into] words.",
            "How do [you|I] write [|the number ]{s} in words?",
            "[Which|What] [word|words] [stands for|stand for|means] the number {s}?",
            "Tell me the word for [|the number ]{s}.",
        ),
    ]


def _order_relations() -> list[Relation]:
    relations = []
    cycles: dict[str, tuple[str, ...]] = {"day": DAYS, "month": MONTHS}
    for unit, names in cycles.items():
        for side, step in (("after", 1), ("before", -1)):
            relations.append(
                _relation(
                    f"{unit}_{side}",
                    _steps(names, step),
                    f"The {unit} {side} {{s}} is {{v}}.",
                    f"the {unit} [|that is |that comes |which comes ]{side} {{s}}",
                    f"[Which|What] {unit} [comes|is|do we have] {side} {{s}}?",
                    f"[What|Which {unit}] [comes|is] {side} {{s}}?",
                )
            )
    ranked: dict[str, tuple[str, ...]] = {
        "month of the year": MONTHS,
        "planet from the sun": PLANETS,
    }
    for unit, names in ranked.items():
        relations.append(
            _relation(
                f"nth_{unit.split()[0]}",
                dict(zip(ORDINALS, names, strict=False)),
                f"The {{s}} {unit} is {{v}}.",
                f"the [|name of the ]{{s}} {unit}",
                f"[Which|What] {unit.split()[0]} is the {{s}} {unit}?",
                f"[Which is|And] the {{s}} {unit}?",
                also=("[And|What about|And what about] the {s}[| one]?",),
            )
        )
    return relations


RELATIONS: tuple[Relation, ...] = (
    *_country_relations(),
    *_thing_relations(),
    *_animal_relations(),
    *_order_relations(),
)
