"""Log-probabilities of chosen and most probable tokens, computed on the device and read later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...platforms.interface import Device
from ..types import PositionLogprobs


@dataclass(frozen=True, slots=True)
class HostLogprobs:
    """Host copies, to be read after the launch's event. `chosen_ids` int64 `[rows]`,
    `chosen` fp32 `[rows]`, `ranks` int64 `[rows]`; `top_ids`, `top` `[rows, k]`, best first."""

    chosen_ids: Tensor
    chosen: Tensor
    ranks: Tensor
    top_ids: Tensor
    top: Tensor

    def positions(self, counts: Sequence[int]) -> list[PositionLogprobs]:
        """One entry a row: its chosen token, then `counts[row]` of the top ones."""
        chosen_ids, chosen = self.chosen_ids.tolist(), self.chosen.tolist()
        ranks = self.ranks.tolist()
        top_ids, top = self.top_ids.tolist(), self.top.tolist()
        return [
            PositionLogprobs(
                token_ids=[chosen_ids[row], *top_ids[row][:count]],
                logprobs=[chosen[row], *top[row][:count]],
                ranks=[ranks[row], *range(1, count + 1)],
            )
            for row, count in enumerate(counts)
        ]


def gather_logprobs(device: Device, logits: Tensor, chosen: Tensor, top: int) -> HostLogprobs:
    """log softmax of `logits`, fp32 `[rows, vocab]`, at `chosen`, int64 `[rows]`, with ranks (1 +
    how many are more probable), and the `top` largest. Call it inside a launch."""
    logprobs = logits.log_softmax(-1)
    at_chosen = logprobs.gather(-1, chosen[:, None])
    ranks = (logprobs > at_chosen).sum(-1) + 1
    values, ids = logprobs.topk(top, dim=-1)
    copies = (device.to_host(t) for t in (chosen, at_chosen[:, 0], ranks, ids, values))
    return HostLogprobs(*copies)


def resolve_count(asked: int, vocab: int) -> int:
    """How many top tokens a request gets: -1 asks for the whole vocabulary."""
    return vocab if asked < 0 else min(asked, vocab)
