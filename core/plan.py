"""What the scheduler tells the executor each step, and what comes back.

A `StepPlan` holds only deltas and is serialisable, so that one process, several ranks or several
hosts are the same call. The runner keeps the rows' state (token table, block tables, sampling
state) between steps; sampled tokens are written into the token table where they were sampled, so
the plan never carries them back and a step may be planned while the one before it still runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from .types import PositionLogprobs


@dataclass(frozen=True, slots=True)
class RowSampling:
    """A row's sampling settings as the sampler reads them; every default is resolved.

    `seed` is a concrete unsigned 64-bit key. `suppress_ids` are banned until `min_tokens` tokens
    have been generated. `logprobs` None: none wanted. `beam_width` > 0: the row draws no token
    but reports its `logprobs` most probable ones, and waits for the host.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: list[int] | None = None
    bad_words_ids: list[list[int]] = field(default_factory=list)
    min_tokens: int = 0
    suppress_ids: list[int] = field(default_factory=list)
    seed: int = 0
    child_index: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    beam_width: int = 0


@dataclass(frozen=True, slots=True)
class NewRow:
    """A request takes a row: everything the runner must know of it, once.

    `token_ids` are all known tokens (prompt, and after a preemption what was generated);
    `block_ids[g]` is its block table in cache group g (freed window blocks are 0, the scratch
    block).
    """

    row: int
    token_ids: list[int]
    num_prompt: int
    block_ids: list[list[int]]
    sampling: RowSampling


class BlockAppend(NamedTuple):
    """`block_ids` follow at the end of the row's table in cache group `group`."""

    row: int
    group: int
    block_ids: list[int]


class BlockCopy(NamedTuple):
    """Copy one whole block in every layer of `group`, before the forward."""

    group: int
    source: int
    target: int


class BlockRef(NamedTuple):
    """One block of one cache group."""

    group: int
    block: int


@dataclass(slots=True)
class StepPlan:
    """One step. `rows`, `starts`, `counts`, `emits` are parallel lists, one entry a scheduled row:
    the row computes tokens [start, start + count) of its token table, and yields a token (or log-
    probabilities) at the end iff `emits`. Order of application: removed, added, blocks, scrubs,
    copies, forward.
    """

    step_id: int
    removed: list[int] = field(default_factory=list)
    added: list[NewRow] = field(default_factory=list)
    blocks: list[BlockAppend] = field(default_factory=list)
    scrubs: list[BlockRef] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    emits: list[bool] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)

    @property
    def empty(self) -> bool:
        """Nothing to compute and nothing to tell the runner."""
        return not (self.rows or self.removed or self.copies or self.scrubs)


@dataclass(slots=True)
class StepOutput:
    """What a step yields, parallel to the plan's `rows`.

    `tokens[i]`: the 0..k tokens row i yielded. `logprobs[i]` / `prompt_logprobs[i]` (keyed by the
    plan's index, present only where asked): one entry a yielded token / a prompt position that
    was computed in this step (position p holds the log-probabilities of token p+1).
    `failed`: indices whose logits held NaN. `error`: the whole step raised; nothing was yielded.
    """

    step_id: int
    tokens: list[list[int]]
    logprobs: dict[int, list[PositionLogprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[PositionLogprobs]] = field(default_factory=dict)
    failed: list[int] = field(default_factory=list)
    error: str | None = None
