"""transformers as a peer: `generate` over one left-padded static batch."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch
from protocol import serve
from transformers import AutoModelForCausalLM, StoppingCriteria

STATE: dict[str, Any] = {}


class Clock(StoppingCriteria):
    """Notes when each token of the batch came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def load(model: str, dtype: str, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    start = time.perf_counter()
    STATE["model"] = AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()
    return {"seconds": time.perf_counter() - start}


def _padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


@torch.inference_mode()
def run(prompts: list[list[int]], outputs: list[int], keep_prefix: bool = False) -> dict[str, Any]:
    ids, mask = _padded(prompts)
    clock = Clock()
    start = time.perf_counter()
    STATE["model"].generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max(outputs),
        min_new_tokens=max(outputs),
        do_sample=False,
        stopping_criteria=[clock],
        pad_token_id=0,
    )
    return {
        "seconds": time.perf_counter() - start,
        # A static batch runs to its longest request; only what was asked for counts.
        "output_tokens": sum(outputs),
        "ttft": clock.times[0] - start,
        "decode_seconds": clock.times[-1] - clock.times[0],
        "cached_tokens": 0,
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


@torch.inference_mode()
def score(prompts: list[list[int]]) -> list[dict[str, float]]:
    answers = []
    for prompt in prompts:
        logits = STATE["model"](torch.tensor([prompt]), logits_to_keep=1).logits[0, -1].float()
        logprobs = logits.log_softmax(-1)
        token = int(logprobs.argmax())
        answers.append({"token": token, "logprob": float(logprobs[token])})
    return answers


if __name__ == "__main__":
    serve({"load": load, "run": run, "score": score})
