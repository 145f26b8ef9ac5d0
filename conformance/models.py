"""Random tiny models, and what `transformers` makes of them: the oracle of engines.

With the usual initializer_range of 0.02 a random model repeats one token and equality proves
little; with 0.15 most tokens differ and the top two logits stay apart. Head size 64 and hidden
size 128, so that packed and tiled kernels really run.
"""

from __future__ import annotations

import functools
import random
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

VOCAB = 1031
WINDOW = 21
MIN_MARGIN = 1e-4
"""Prompts whose top two logits come closer than this on the way are rejected: there the order of
a sum decides, and equality means nothing."""

_COMMON: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 16384,  # sequences are longer where blocks are large
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

_SCALED_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "llama_biased": (
        "Llama",
        {"rope_parameters": _SCALED_ROPE, "attention_bias": True, "mlp_bias": True},
    ),
}
"""Name → (class prefix in `transformers`, what differs from the others): grouped-query attention;
norms of queries and keys, and a tied head; a sliding window; a scaled rope, and biases."""


@dataclass(frozen=True)
class Case:
    """A prompt, its greedy continuation, and the smallest margin on the way."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    margin: float


class Oracle:
    """One model of `MODELS` in `transformers`, fp32 on the host, without a cache of any kind."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model = _build(name)

    @functools.cached_property
    def path(self) -> str:
        """The saved model, config.json and model.safetensors, for as long as this process lives."""
        path = Path(_directory().name, self.name)
        self.model.config.save_pretrained(path)
        tied = self.model.config.tie_word_embeddings
        tensors = {
            name: tensor.contiguous()
            for name, tensor in self.model.state_dict().items()
            if not (tied and name == "lm_head.weight")
        }
        save_file(tensors, path / "model.safetensors")
        return str(path)

    def logits(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """fp32 `[sequences, tokens, vocab]` for sequences of one length."""
        with torch.inference_mode():
            found = self.model(torch.tensor(tokens), use_cache=False).logits
        return torch.as_tensor(found).float()

    def case(self, prompt: Sequence[int], count: int) -> Case:
        """The greedy continuation of one prompt, however clear."""
        return self._continued([list(prompt)], count)[0]

    def logprobs(self, tokens: Sequence[int]) -> Tensor:
        """fp32 `[tokens, vocab]`: the distribution after each of the tokens."""
        return self.logits([tokens])[0].log_softmax(-1)

    def cases(self, lengths: Sequence[int], count: int, seed: int) -> list[Case]:
        """One case for each of `lengths`, of `count` tokens, in their order. Raises `ValueError`
        where no prompt keeps its top two logits apart."""
        made: dict[int, list[Case]] = {n: self._of_length(n, lengths, count, seed) for n in lengths}
        return [made[length].pop() for length in lengths]

    def _of_length(self, length: int, lengths: Sequence[int], count: int, seed: int) -> list[Case]:
        wanted = lengths.count(length)
        for attempt in range(8):
            drawn = random.Random(f"{seed}/{length}/{attempt}")
            known = [[drawn.randrange(3, VOCAB) for _ in range(length)] for _ in range(wanted + 1)]
            found = [case for case in self._continued(known, count) if case.margin >= MIN_MARGIN]
            if len(found) >= wanted:
                return found[:wanted]
        raise ValueError(f"no clear prompt of {length} tokens for {self.name} (seed {seed})")

    def _continued(self, known: list[list[int]], count: int) -> list[Case]:
        """Greedy, `count` tokens for each of the prompts of one length."""
        length = len(known[0])
        margins = torch.full((len(known),), torch.inf)
        for _ in range(count):
            top = self.logits(known)[:, -1].topk(2)
            margins = torch.minimum(margins, top.values[:, 0] - top.values[:, 1])
            for tokens, best in zip(known, top.indices[:, 0].tolist(), strict=True):
                tokens.append(best)
        return [
            Case(tuple(tokens[:length]), tuple(tokens[length:]), margin)
            for tokens, margin in zip(known, margins.tolist(), strict=True)
        ]


def _build(name: str) -> Any:
    family, differences = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**_COMMON, **differences})
    config.architectures = [f"{family}ForCausalLM"]
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
        unsettle(model)
    return model


def unsettle(model: torch.nn.Module) -> None:
    """Norm weights start at 1 and biases at 0, where dropping them would go unnoticed."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.7, 1.3)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3)


@functools.cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="trimaran-conform-")


@functools.cache
def oracle(name: str) -> Oracle:
    return Oracle(name)


@functools.cache
def cases(name: str, lengths: tuple[int, ...], count: int, seed: int) -> list[Case]:
    """`Oracle.cases`, computed once: checks that ask for the same share them."""
    return oracle(name).cases(lengths, count, seed)


def describe(found: Sequence[Case]) -> dict[str, float]:
    """What a comparison proves: how many of the tokens differ, and how clear they were."""
    total = sum(len(case.tokens) for case in found)
    distinct = sum(len(set(case.tokens)) for case in found)
    margin = min(case.margin for case in found)
    return {"distinct tokens": distinct, "tokens": total, "smallest margin": margin}
