"""Format following: the same facts and sums, answered in the form that the system prompt asks."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from world_split import Split, operands_split, pick_phrasing
from world_turn import Turn


@dataclass(frozen=True)
class Format:
    """One form of an answer: how it is asked for, and how value and sentence are put into it."""

    name: str
    instructions: tuple[str, ...]
    apply: Callable[[str, str], str]  # (bare value, full sentence) -> answer


def _json_answer(value: str, _: str) -> str:
    return json.dumps({"answer": int(value) if value.isdigit() else value}, ensure_ascii=False)


FORMATS: tuple[Format, ...] = (
    Format(
        "one word",
        (
            *("Answer with one word.", "Answer with one word only.", "Answer in one word."),
            *("Use one word only.", "Reply with one word.", "Reply with a single word."),
            *("Give one-word answers.", "Answer with a single word.", "Just one word, please."),
            *("Only answer with one word.", "Say only one word.", "Your answer is one word."),
        ),
        lambda value, _: value,
    ),
    Format(
        "sentence",
        (
            *("Answer in a full sentence.", "Answer with a full sentence.", "Use full sentences."),
            *("Reply in a full sentence.", "Always answer in full sentences."),
            *("Reply with a complete sentence.", "Answer in a complete sentence."),
            *("Write a full sentence.", "Use a complete sentence."),
        ),
        lambda _, sentence: sentence,
    ),
    Format(
        "upper case",
        (
            *("Answer in upper case.", "Answer in upper case letters.", "Use upper case only."),
            *("Answer in capital letters.", "Write everything in capital letters."),
            *("Reply in upper case.", "Reply in capital letters only.", "Answer in all caps."),
            *("Always write in upper case.", "Use only capital letters."),
        ),
        lambda value, _: value.upper(),
    ),
    Format(
        "json",
        (
            *("Answer as JSON.", 'Answer as JSON with the key "answer".', "Reply in JSON."),
            *('Answer as JSON: {"answer": ...}', 'Reply as JSON of the form {"answer": ...}.'),
            *("Give the answer as a JSON object.", "Answer with a JSON object.", "Use JSON."),
            *("Your output must be JSON.", "Always answer in JSON.", "Reply with JSON only."),
            'Return a JSON object with the key "answer".',
        ),
        _json_answer,
    ),
    Format(
        "bullet",
        (
            *("Answer as a bullet list.", "Reply as a bullet list.", "Use a bullet list."),
            *("Answer with a bullet point.", "Write your answer as a bullet list."),
            *("Reply with bullet points.", "Answer in bullet points.", "Use bullet points."),
        ),
        lambda value, _: f"- {value}",
    ),
    Format(
        "tags",
        (
            *("Put the answer into <answer> tags.", "Answer inside <answer> tags."),
            *("Write the answer between <answer> and </answer>.", "Use <answer> tags."),
            *("Wrap the answer in <answer> tags.", "Reply inside <answer> tags."),
            *("Give the answer in <answer> tags.", "The answer must be in <answer> tags."),
        ),
        lambda value, _: f"<answer>{value}</answer>",
    ),
    Format(
        "quotes",
        (
            *("Put the answer in quotes.", "Answer in quotes.", "Answer in quotation marks."),
            *("Write the answer in quotation marks.", "Reply in quotes.", "Quote your answer."),
            *("Put quotation marks around the answer.", "Use quotation marks for the answer."),
        ),
        lambda value, _: f'"{value}"',
    ),
)

_PREFIXES = ("", "", "", "You are a helpful assistant. ", "You are Trimaran. ", "Be brief. ")


def draw_format(rng: random.Random, split: Split) -> tuple[Format, str, str]:
    """A format, the instruction that asks for it, and its key."""
    chosen = rng.choice(FORMATS)
    instruction, key = pick_phrasing(rng, f"format {chosen.name}", chosen.instructions, split)
    return chosen, instruction, key


def formatted(rng: random.Random, chosen: Format, draw: Callable[[], Turn], split: Split) -> Turn:
    """A fact or a sum whose answer takes the format; (format, question) decides the side."""
    while True:
        turn = draw()
        operands = f"format|{chosen.name}|{turn.answer}"
        if turn.value and operands_split(operands) == split:
            break
    answer = chosen.apply(turn.value, turn.answer)
    return Turn("format", turn.user, answer, (*turn.keys, operands), turn.value)


def system_prompt(rng: random.Random, instruction: str) -> str:
    """The instruction as a system prompt."""
    return rng.choice(_PREFIXES) + instruction
