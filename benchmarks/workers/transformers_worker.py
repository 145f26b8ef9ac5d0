"""transformers as a peer: `generate` over one left-padded static batch."""

from __future__ import annotations

import time
from typing import Any

import torch
from protocol import measurement, serve
from transformers import AutoModelForCausalLM, StoppingCriteria

STATE: dict[str, Any] = {}


class Clock(StoppingCriteria):
    """Notes when each token of the batch came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def load(
    model: str, threads: int, kv_tokens: int, max_len: int, options: dict[str, Any]
) -> dict[str, Any]:
    """`kv_tokens` and `max_len` have no counterpart: the cache grows with the batch. Of the options
    `device` is where the model goes; the others are `from_pretrained`'s."""
    torch.set_num_threads(threads)
    options = dict(options)
    device = torch.device(options.pop("device", "cpu"))
    flags = {"dtype": "bfloat16", "attn_implementation": "sdpa", **options}
    start = time.perf_counter()
    STATE["model"] = AutoModelForCausalLM.from_pretrained(model, **flags).to(device).eval()
    return {"seconds": time.perf_counter() - start, "flags": flags}


def _padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


@torch.inference_mode()
def run(
    prompts: list[list[int]], outputs: list[int], keep_prefix: bool, **generation: Any
) -> dict[str, Any]:
    """`generation`: options of `generate` besides."""
    device = STATE["model"].device
    ids, mask = (one.to(device) for one in _padded(prompts))
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
        **generation,
    )
    # A static batch runs to its longest request; only what was asked for counts.
    seconds, decode = time.perf_counter() - start, clock.times[-1] - clock.times[0]
    return measurement(seconds, sum(outputs), [clock.times[0] - start], [decode])


@torch.inference_mode()
def score(prompts: list[list[int]]) -> list[dict[str, Any]]:
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        logprobs = STATE["model"](ids).logits[0].float().log_softmax(-1)
        token = int(logprobs[-1].argmax())
        given = logprobs[:-1].gather(1, ids.T[1:]).flatten().tolist()
        answers.append(
            {"token": token, "logprob": float(logprobs[-1, token]), "prompt_logprobs": given}
        )
    return answers


if __name__ == "__main__":
    serve({"load": load, "run": run, "score": score})
