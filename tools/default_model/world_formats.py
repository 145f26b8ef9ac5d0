"""Format following: the same facts and sums, answered in the form that the system prompt asks."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from world_split import Split, expand, operands_split, pick_phrasing
from world_turn import Turn


@dataclass(frozen=True)
class Format:
    """One form of an answer: how it is asked for, and how value and sentence are put into it."""

    name: str
    instructions: tuple[str, ...]
    apply: Callable[[str, str], str]  # (bare value, full sentence) -> answer


def _json_answer(value: str, _: str) -> str:
    return json.dumps({"answer": int(value) if value.isdigit() else value}, ensure_ascii=False)


_ANSWER = "[Answer|Reply|Respond|Always answer|Always reply|Please answer|Only answer|Just answer]"
_WRITE = "[Write|Put|Give|Always write|Please write|Please give] [the answer|your answer]"
_CAPITALS = "[upper case|upper case letters|capital letters|capitals|all caps]"

FORMATS: tuple[Format, ...] = (
    Format(
        "one word",
        expand(
            f"{_ANSWER} [with|in] [one word|a single word|one single word][| only].",
            "[Use|Say|Write|Give|Reply] [only one|just one|one|a single] word[|, please].",
            "[Just|Only] [one|a single] word[|, please].",
            "Your answer [is|must be|has] one word[| only].",
            "Give [one-word|single-word] answers[| only].",
        ),
        lambda value, _: value,
    ),
    Format(
        "sentence",
        expand(
            f"{_ANSWER} [with|in] [a full sentence|a complete sentence|full sentences|complete "
            "sentences].",
            "[Use|Write|Always use] [a full sentence|a complete sentence|full sentences|complete "
            "sentences][|, please].",
            "Your answer [is|must be] a [full|complete] sentence.",
        ),
        lambda _, sentence: sentence,
    ),
    Format(
        "upper case",
        expand(
            f"{_ANSWER} [in|with] [|only ]{_CAPITALS}[| only].",
            f"[Write|Always write|Please write] [|everything |all |the answer |your answer ]in "
            f"{_CAPITALS}.",
            f"[Use|Always use|Please use] [|only ]{_CAPITALS}[| only|, please].",
            f"[Your answer|The answer|Everything] [is|must be] in {_CAPITALS}.",
        ),
        lambda value, _: value.upper(),
    ),
    Format(
        "json",
        expand(
            f"{_ANSWER} [as|in|with] [JSON|a JSON object][| only].",
            f'{_ANSWER} [as|in|with] [JSON|a JSON object] with the key "answer".',
            f'{_ANSWER} [as|in|with] JSON[|:| of the form] {{"answer": ...}}[|.]',
            f"{_WRITE} as [JSON|a JSON object].",
            "[Use|Always use|Return|Write|Give me] [JSON|a JSON object][| only].",
            '[Return|Write|Give me] a JSON object with the key "answer".',
            "[Your output|Your answer|The answer|The output] must be [JSON|a JSON object].",
        ),
        _json_answer,
    ),
    Format(
        "bullet",
        expand(
            f"{_ANSWER} [as|in|with|using] [a bullet list|bullet points|a bullet point|a bulleted "
            "list].",
            f"{_WRITE} as a [bullet list|bullet point|bulleted list].",
            "[Use|Always use|Write|Give me] [a bullet list|bullet points|a bulleted list].",
            "[Your answer|The answer] must be a [bullet list|bullet point|bulleted list].",
        ),
        lambda value, _: f"- {value}",
    ),
    Format(
        "tags",
        expand(
            f"{_ANSWER} [in|inside|with|within] <answer> tags.",
            f"{_WRITE} [in|into|inside|within] <answer> tags.",
            f"{_WRITE} between <answer> and </answer>.",
            "[Use|Always use] <answer> tags[| for the answer| for your answer| around the answer].",
            "Wrap [the answer|your answer] in <answer> tags.",
            "[The answer|Your answer] must be [in|inside|within] <answer> tags.",
        ),
        lambda value, _: f"<answer>{value}</answer>",
    ),
    Format(
        "quotes",
        expand(
            f"{_ANSWER} [in|with|inside] [|double ][quotes|quotation marks].",
            f"{_WRITE} [in|into|inside|between] [|double ][quotes|quotation marks].",
            "[Use|Always use|Put] [quotes|quotation marks] [around|for] [the answer|your answer].",
            "[Quote|Always quote|Please quote] [the answer|your answer].",
            "[The answer|Your answer] must be in [quotes|quotation marks].",
        ),
        lambda value, _: f'"{value}"',
    ),
)

_PREFIXES = ("", "", "", "You are a helpful assistant. ", "You are Trimaran. ", "Be brief. ")


def draw_format(
    rng: random.Random, split: Split, weights: dict[str, float]
) -> tuple[Format, str, str]:
    """A format, the instruction that asks for it, and its key; a format weighs 1 by default."""
    if weights:  # `choices` draws other numbers than `choice`: held-out items are by the latter
        chosen = rng.choices(FORMATS, [weights.get(form.name, 1.0) for form in FORMATS])[0]
    else:
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
