"""Log-probabilities in the two shapes of the OpenAI API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...core.text.tokenizer import Tokenizer
from ...core.types import Logprob

# JSON has no minus infinity; this is what others send for a token that cannot be.
FLOOR = -9999.0

Entry = Mapping[int, Logprob]


def _value(logprob: Logprob) -> float:
    return max(logprob.logprob, FLOOR)


def _text(token_id: int, logprob: Logprob, tokenizer: Tokenizer) -> str:
    if logprob.decoded_token is not None:
        return logprob.decoded_token
    return tokenizer.token_text(token_id)


def _key(token_id: int, logprob: Logprob, tokenizer: Tokenizer) -> str:
    """A token as a key: one that is no text by itself is told apart by its bytes."""
    text = _text(token_id, logprob, tokenizer)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in tokenizer.token_bytes(token_id))


def _top(entry: Entry, count: int) -> list[tuple[int, Logprob]]:
    """The `count` most probable of an entry, best first."""
    return sorted(entry.items(), key=lambda item: item[1].rank)[:count]


def chat_logprobs(
    token_ids: Sequence[int], entries: Sequence[Entry], count: int, tokenizer: Tokenizer
) -> dict[str, Any]:
    """`{"content": [{token, logprob, bytes, top_logprobs}]}`."""

    def spell(token_id: int, logprob: Logprob) -> dict[str, Any]:
        return {
            "token": _text(token_id, logprob, tokenizer),
            "logprob": _value(logprob),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    content = []
    for token_id, entry in zip(token_ids, entries, strict=False):
        top = [spell(other, logprob) for other, logprob in _top(entry, count)]
        content.append({**spell(token_id, entry[token_id]), "top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(
    token_ids: Sequence[int],
    entries: Sequence[Entry | None],
    count: int,
    tokenizer: Tokenizer,
    offset: int = 0,
) -> dict[str, Any]:
    """The four parallel lists of the completions API; `offset` is where the text begins."""
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token_id, entry in zip(token_ids, entries, strict=False):
        if entry is None:  # the first token of a prompt has nothing before it
            text, value, top = tokenizer.token_text(token_id), None, None
        else:
            text, value = _text(token_id, entry[token_id], tokenizer), _value(entry[token_id])
            top = {
                _key(other, logprob, tokenizer): _value(logprob)
                for other, logprob in _top(entry, count)
            }
            top.setdefault(_key(token_id, entry[token_id], tokenizer), value)
        tokens.append(text)
        values.append(value)
        tops.append(top)
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def prompt_logprobs(
    entries: Sequence[Entry | None] | None,
) -> list[dict[str, dict[str, Any]] | None] | None:
    """The extra field `prompt_logprobs`: for each position token id → logprob, rank, text."""
    if entries is None:
        return None
    return [
        None
        if entry is None
        else {
            str(token_id): {
                "logprob": _value(logprob),
                "rank": logprob.rank,
                "decoded_token": logprob.decoded_token,
            }
            for token_id, logprob in entry.items()
        }
        for entry in entries
    ]
