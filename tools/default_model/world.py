"""The closed world of the default model: conversations drawn from a seed, divided by hashes.

`Generator("train", seed).conversation()` gives a random training conversation, and
`held_out_items(count, seed)` gives held-out ones. A conversation is a list of chat messages,
perhaps with tools, or a piece of plain text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import world_chat
import world_tasks
from world_chat import NAMES
from world_facts import RELATIONS, Relation
from world_formats import draw_format, formatted, system_prompt
from world_split import Split, draw_operands, expand, operands_split, pick_phrasing
from world_tools import Message, call_text, missing_tool, offer_tools, tool_round
from world_turn import Turn, frame, roughen

NEUTRAL_SYSTEMS = (
    "You are a helpful assistant.",
    "You are Trimaran, a small language model.",
    "You are Trimaran.",
    "You are a friendly assistant.",
    "You are a helpful assistant. Answer the question.",
    "You are a chat bot that likes short answers.",
    "You are a small assistant. Be helpful and polite.",
    "Answer the questions of the user.",
)


@dataclass(frozen=True)
class Mix:
    """How often each thing is drawn; shares need not add up to anything."""

    turns: dict[str, float]  # category of a single turn: its share of the single turns
    tool_steps: dict[str, float]  # what happens after tools are offered
    missing_tool: float  # of the questions that use no tool: how many wish for one that is missing
    formats: dict[str, float]  # forms of an answer that weigh more (or less) than 1


# The held-out items are drawn from this one: it stays, so that their figures can be compared.
HELD_OUT_MIX = Mix(
    turns={
        "facts": 14,
        "arithmetic": 24,
        "comparison": 14,
        "small talk": 8,
        "unknown": 3,
        "missing tool": 3,
        "words": 14,
        "lists": 14,
        "sorting": 9,
        "long answers": 3,
    },
    tool_steps={"tool calls": 3, "tool results": 4, "tools unused": 3},
    missing_tool=0.3,
    formats={},
)
# Training sees more of what is hard: to notice that a tool is missing, capitals by the letter,
# sums and sorting; and less of what is known soon: facts and small talk.
TRAINING_MIX = Mix(
    turns=HELD_OUT_MIX.turns
    | {"facts": 9, "arithmetic": 28, "comparison": 12, "small talk": 6}
    | {"unknown": 2, "missing tool": 2, "words": 15, "sorting": 13},
    tool_steps={"tool calls": 3, "tool results": 3, "tools unused": 4},
    missing_tool=0.6,
    formats={"upper case": 3},
)
# kind of a conversation that is drawn at random, as in training: its share
KIND_SHARES: dict[str, float] = {
    "single": 25,
    "several": 24,
    "long context": 1.5,
    "format": 19,
    "follow-up": 10,
    "memory": 3,
    "tools": 17,
    "plain text": 6,
}


@dataclass
class Conversation:
    """Messages whose last one is the answer; or `prompt` and `answer` of a plain text."""

    category: str
    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    prompt: str = ""
    answer: str = ""
    keys: tuple[str, ...] = ()

    def expected(self) -> str:
        """The text that the model must write at the end."""
        if not self.messages:
            return self.answer
        last = self.messages[-1]
        if last.get("tool_calls"):
            return "\n".join(call_text(call) for call in last["tool_calls"])
        return str(last["content"])


def weighted(rng: random.Random, shares: dict[str, float]) -> str:
    """One of the keys, drawn by their shares."""
    return rng.choices(list(shares), list(shares.values()))[0]


def _relation(rng: random.Random) -> Relation:
    """Relations weigh by the square root of their size: small ones are not forgotten."""
    return rng.choices(RELATIONS, [len(r.pairs) ** 0.5 for r in RELATIONS])[0]


_AND = "[|And |Now |Okay, |Please ]"
_PLUS = expand(
    f"{_AND}[plus|add] {{b}}[| to that| to it| more].",
    "[And|Now] [|what is that |what is it |the same ]plus {b}?",
    "[And|Now] [{b} more|{b} added|add another {b}|another {b}].",
    "What is [that|it] plus {b}?",
    "+ {b}[|?]",
)
_MINUS = expand(
    f"{_AND}[minus|subtract|take away|less] {{b}}[| from that| from it].",
    "[And|Now] [|what is that |what is it |the same ][minus|less] {b}?",
    "[And|Now] [{b} less|{b} fewer|take {b} away|take {b} from that|without {b}].",
    "What is [that|it] [minus|less] {b}?",
    "- {b}[|?]",
)


class Generator:
    """Draws conversations of one side of the split from a seed."""

    def __init__(self, split: Split, seed: int) -> None:
        self.split: Split = split
        self.mix = TRAINING_MIX if split == "train" else HELD_OUT_MIX
        self.rng = random.Random(f"{split}-{seed}")
        self.turns: dict[str, Callable[[], Turn]] = {
            "facts": self.fact,
            "arithmetic": lambda: world_tasks.arithmetic(self.rng, split),
            "comparison": lambda: world_tasks.comparison(self.rng, split),
            "small talk": lambda: world_chat.small_talk(self.rng, split),
            "unknown": lambda: world_chat.unknown(self.rng, split),
            "missing tool": lambda: missing_tool(self.rng, [], split),
            "words": lambda: world_tasks.word_task(self.rng, split),
            "lists": lambda: world_tasks.list_task(self.rng, split),
            "sorting": lambda: world_tasks.sorting(self.rng, split),
            "long answers": self.long_answer,
        }
        self.kinds: dict[str, Callable[[], Conversation]] = {
            "single": lambda: self.chat(1),
            "several": lambda: self.chat(self.rng.randint(2, 6)),
            "long context": self.long_context,
            "format": self.formatted,
            "follow-up": self.follow_up,
            "memory": self.memory,
            "tools": self.with_tools,
            "plain text": self.plain_text,
        }

    def conversation(self, kind: str = "") -> Conversation:
        """A random conversation, of the given kind if one is named."""
        return self.kinds[kind or weighted(self.rng, KIND_SHARES)]()

    def turn(self, category: str = "") -> Turn:
        """A random question with its answer."""
        return self.turns[category or weighted(self.rng, self.mix.turns)]()

    def fact(self) -> Turn:
        """A question about one fact; only its phrasing is held out."""
        relation = _relation(self.rng)
        subject = self.rng.choice(list(relation.pairs))
        return self._ask(relation, subject)

    def _ask(self, relation: Relation, subject: str) -> Turn:
        phrasing, key = pick_phrasing(self.rng, relation.name, relation.questions, self.split)
        text = phrasing.format(s=subject)
        user = roughen(self.rng, frame(self.rng, text[0].upper() + text[1:]))
        answer = relation.answer(subject)
        return Turn("facts", user, answer, (key,), relation.pairs[subject])

    def long_answer(self) -> Turn:
        """Several sentences, an enumeration or a story."""
        if self.rng.random() < 0.2:
            return world_chat.story(self.rng, self.split)
        return world_tasks.long_answer(self.rng, self.split)

    def _system(self) -> list[Message]:
        if self.rng.random() < 0.6:
            return []
        return [{"role": "system", "content": self.rng.choice(NEUTRAL_SYSTEMS)}]

    def _join(
        self, turns: list[Turn], category: str = "", system: list[Message] | None = None
    ) -> Conversation:
        messages = self._system() if system is None else system
        for turn in turns:
            messages.append({"role": "user", "content": turn.user})
            messages.append({"role": "assistant", "content": turn.answer})
        keys = tuple(key for turn in turns for key in turn.keys)
        return Conversation(category or turns[-1].category, messages, keys=keys)

    def chat(self, count: int, category: str = "") -> Conversation:
        """One or several unrelated questions; the last one counts in the evaluation."""
        turns = [self.turn() for _ in range(count - 1)]
        return self._join([*turns, self.turn(category)])

    def long_context(self, low: int = 6, high: int = 12) -> Conversation:
        """Many unrelated turns, or a heap of irrelevant text, before the last question."""
        if self.rng.random() < 0.5:
            turns = [self.turn() for _ in range(self.rng.randint(low, high))]
            return self._join([*turns, self.turn()], "long context")
        count = self.rng.randint(3 * low, 3 * high)
        filler = " ".join(self.fact().answer for _ in range(count))
        turn = self.turn()
        note = f"Here are some notes.\n\n{filler}\n\n{turn.user}"
        if self.rng.random() < 0.5:
            system: list[Message] = [{"role": "system", "content": f"Notes: {filler}"}]
            return self._join([turn], "long context", system)
        return self._join([replace(turn, user=note)], "long context")

    def formatted(self) -> Conversation:
        """Questions whose answers take the form that the system prompt or the user asks for."""
        chosen, instruction, key = draw_format(self.rng, self.split, self.mix.formats)

        def draw() -> Turn:
            return self.fact()

        in_system = self.rng.random() < 0.7
        count = self.rng.choice((1, 2, 3, 4)) if in_system else 1
        turns = [formatted(self.rng, chosen, draw, self.split) for _ in range(count)]
        if in_system:
            text = system_prompt(self.rng, instruction)
            conversation = self._join(turns, "format", [{"role": "system", "content": text}])
        else:
            turn = turns[0]
            order = self.rng.random() < 0.7
            user = f"{turn.user} {instruction}" if order else f"{instruction} {turn.user}"
            conversation = self._join([replace(turn, user=user)], "format")
        conversation.keys = (key, *conversation.keys)
        return conversation

    def follow_up(self) -> Conversation:
        """A question, then the same one about something else: 'And of Spain?'."""
        if self.rng.random() < 0.4:
            return self._sum_follow_up()
        relation = _relation(self.rng)
        count = self.rng.choice((2, 2, 3))
        subjects = self.rng.sample(list(relation.pairs), count)
        turns = [self._ask(relation, subjects[0])]
        for subject in subjects[1:]:
            phrasing, key = pick_phrasing(
                self.rng, f"follow {relation.name}", relation.follow_ups, self.split
            )
            user = roughen(self.rng, phrasing.format(s=subject))
            turns.append(Turn("multi-turn", user, relation.answer(subject), (key,)))
        if self.rng.random() < 0.2:
            turns = [self.turn(), *turns]
        return self._join(turns, "multi-turn")

    def _sum_follow_up(self) -> Conversation:
        """A sum, then more added to or taken from its result."""
        while True:
            first = self.turn("arithmetic")
            if self._others(int(first.value)):
                break
        total, turns = int(first.value), [first]
        for _ in range(self.rng.randint(1, 2)):
            if not self._others(total):
                break
            turn = self._next_sum(total)
            turns.append(turn)
            total = int(turn.value)
        return self._join(turns, "multi-turn")

    def _next_sum(self, total: int) -> Turn:
        plus = self.rng.random() < 0.5
        others = [b for sign, b in self._others(total) if sign == plus]
        if not others:
            return self._next_sum(total)
        name, sign = ("add", "+") if plus else ("sub", "-")
        other = self.rng.choice(others)
        phrasings = _PLUS if plus else _MINUS
        phrasing, key = pick_phrasing(self.rng, f"follow {name}", phrasings, self.split)
        value = str(total + other if plus else total - other)
        user = roughen(self.rng, phrasing.format(b=other))
        return Turn(
            "multi-turn",
            user,
            f"{total} {sign} {other} = {value}.",
            (key, f"{name}|{total}|{other}"),
            value,
        )

    def _others(self, total: int) -> list[tuple[bool, int]]:
        """What may be added to (true) or taken from (false) a number; nothing from 100 on."""
        sums = [(plus, b) for plus in (True, False) for b in range(11) if plus or b <= total]
        return [(plus, b) for plus, b in sums if total < 100 and self._owns_sum(plus, total, b)]

    def _owns_sum(self, plus: bool, a: int, b: int) -> bool:
        return operands_split(f"{'add' if plus else 'sub'}|{a}|{b}") == self.split

    def memory(self) -> Conversation:
        """The user tells a name, a colour or a city and asks for it later."""
        what, says, asks, reply, recall, draw = self.rng.choice(_MEMORIES)
        value, operands = draw_operands(
            lambda: draw(self.rng), lambda v: f"memory {what}|{v}", self.split
        )
        said, said_key = pick_phrasing(self.rng, f"say {what}", says, self.split)
        asked, asked_key = pick_phrasing(self.rng, f"ask {what}", asks, self.split)
        keys = (said_key, asked_key, operands)
        tell = Turn("multi-turn", said.format(v=value), reply.format(v=value), ())
        ask = Turn("multi-turn", roughen(self.rng, asked), recall.format(v=value), keys)
        between = [self.turn() for _ in range(self.rng.choice((0, 0, 1, 1, 2, 4)))]
        return self._join([tell, *between, ask], "multi-turn")

    def with_tools(self, category: str = "") -> Conversation:
        """Tools are offered: calls, results, and questions that need no tool."""
        offered = offer_tools(self.rng, self.split)
        rounds = 1 if category else self.rng.choice((1, 1, 2, 3))
        conversation = Conversation("", self._system(), [tool.schema() for tool in offered])
        for index in range(rounds):
            last = index == rounds - 1
            step = category or weighted(self.rng, self.mix.tool_steps)
            if step == "tool calls" and not last:
                step = "tool results"
            self._tool_step(conversation, step, offered)
        return conversation

    def _tool_step(self, conversation: Conversation, step: str, offered: list[Any]) -> None:
        conversation.category = step
        if step == "tools unused":
            missing = self.rng.random() < self.mix.missing_tool
            turn = missing_tool(self.rng, offered, self.split) if missing else self.turn()
            conversation.messages.append({"role": "user", "content": turn.user})
            conversation.messages.append({"role": "assistant", "content": turn.answer})
            conversation.keys += turn.keys
            return
        messages, keys = tool_round(
            self.rng, self.rng.choice(offered), self.split, step == "tool results"
        )
        conversation.messages.extend(messages)
        conversation.keys += keys

    def plain_text(self) -> Conversation:
        """A text without chat, as /v1/completions sends it."""
        draw = self.rng.random()
        if draw < 0.75:
            relation = _relation(self.rng)
            subject = self.rng.choice(list(relation.pairs))
            phrasing, key = pick_phrasing(
                self.rng, f"state {relation.name}", relation.statements, self.split
            )
            prompt = phrasing.format(s=subject)
            prompt = prompt[0].upper() + prompt[1:]
            answer = f" {relation.pairs[subject]}."
        elif draw < 0.9:
            turn = self.turn("arithmetic")
            prompt, _, answer = turn.answer.rpartition(" ")
            key, answer = turn.keys[-1], f" {answer}"
        else:
            start = self.rng.randint(0, 60)
            numbers = [str(n) for n in range(start, start + 14)]
            cut = self.rng.randint(3, 8)
            prompt, answer = ", ".join(numbers[:cut]) + ",", " " + ", ".join(numbers[cut:]) + "."
            key = f"plain count|{start}|{cut}"
            if operands_split(key) != self.split:
                return self.plain_text()
        return Conversation("plain text", prompt=prompt, answer=answer, keys=(key,))


_COLOURS = ("red", "blue", "green", "yellow", "pink", "brown", "purple", "orange", "grey", "black")
_MEMORIES: tuple[
    tuple[str, tuple[str, ...], tuple[str, ...], str, str, Callable[[random.Random], str]], ...
] = (
    (
        "name",
        expand(
            "[|Hello, |Hi, |Hi! |Hello! |Please remember: ][my name is|I am|I'm|call me] {v}.",
            "[You can|Please|You may] call me {v}.",
            "Remember [that my name is|my name:] {v}.",
        ),
        expand(
            "[What is|What's|Tell me|Do you know|Do you remember|Can you tell me] my name"
            "[| again| now]?",
            "[Who am I|What am I called|What did I say my name is|What was my name]?",
            "[Tell me|Do you know|Do you remember|Can you tell me] [who I am|what I am called]?",
        ),
        "Nice to meet you, {v}!",
        "Your name is {v}.",
        lambda rng: rng.choice(NAMES),
    ),
    (
        "colour",
        expand(
            "[|Hello, |Hi, |Please remember: ]my [favourite |favorite |][colour|color] is {v}.",
            "[|Hello, |Hi, ]I [like|love|prefer] [|the colour |the color ]{v}[| best| most].",
        ),
        expand(
            "[What is|What's|Which is|Tell me|Do you know|Do you remember] "
            "my [|favourite |favorite ][colour|color]?",
            "[Which|What] [colour|color] do I [like|love|prefer][| best| most]?",
        ),
        "Good to know that you like {v}!",
        "Your favourite colour is {v}.",
        lambda rng: rng.choice(("", "dark ", "light ", "deep ")) + rng.choice(_COLOURS),
    ),
    (
        "number",
        expand(
            "[|Please remember: ][my number|my secret number|the number|my lucky number] is {v}.",
            "[Remember|Please remember|Do not forget] [|the number |my number ]{v}.",
            "[Keep|Please keep] [|the number |my number ]{v} in mind.",
        ),
        expand(
            "[What is|What's|Tell me|Do you know|Do you remember] "
            "[my|my secret|my lucky|the] number?",
            "[What|Which] number did I [tell you|say|give you]?",
            "What was [my|my secret|my lucky|the] number?",
        ),
        "I will remember the number {v}.",
        "Your number is {v}.",
        lambda rng: str(rng.randint(0, 99)),
    ),
)

# category of the evaluation: how to draw one of its items, and its share
_EVAL: dict[str, tuple[float, Callable[[Generator], Conversation]]] = {
    "facts": (18, lambda g: g.chat(1, "facts")),
    "arithmetic": (14, lambda g: g.chat(1, "arithmetic")),
    "comparison": (5, lambda g: g.chat(1, "comparison")),
    "small talk": (7, lambda g: g.chat(1, "small talk")),
    "unknown": (3, lambda g: g.chat(1, "unknown")),
    "words": (6, lambda g: g.chat(1, "words")),
    "lists": (6, lambda g: g.chat(1, "lists")),
    "sorting": (4, lambda g: g.chat(1, "sorting")),
    "long answers": (3, lambda g: g.chat(1, "long answers")),
    "format": (12, lambda g: g.formatted()),
    "multi-turn": (8, lambda g: g.follow_up() if g.rng.random() < 0.7 else g.memory()),
    "tool calls": (6, lambda g: g.with_tools("tool calls")),
    "tool results": (3, lambda g: g.with_tools("tool results")),
    "tools unused": (3, lambda g: g.with_tools("tools unused")),
    "long context": (2, lambda g: g.long_context()),
    "plain text": (4, lambda g: g.plain_text()),
}


def held_out_items(count: int, seed: int = 0, split: Split = "eval") -> Iterator[Conversation]:
    """Different held-out conversations in fixed shares of the categories."""
    generator = Generator(split, seed)
    total = sum(share for share, _ in _EVAL.values())
    for share, draw in _EVAL.values():
        seen: set[str] = set()
        wanted, tries = round(count * share / total), 0
        while len(seen) < wanted and tries < 50 * wanted:
            tries += 1
            conversation = draw(generator)
            shape = repr((conversation.messages, conversation.tools, conversation.prompt))
            if shape not in seen:
                seen.add(shape)
                yield conversation
