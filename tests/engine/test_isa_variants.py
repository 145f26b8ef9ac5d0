"""A whole model by each instruction set of the native kernels: an aligned tiny Qwen3 in bf16, and
with int8 weights, against transformers in fp64; its kernels are those of that instruction set.

The engine runs in a process of its own for each of them. Where the processor lacks the wide sets,
they are emulated."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from helpers.isa_child import KERNELS, NUM_TOKENS, PRECISIONS, THREADS, Found
from helpers.native import build_of, needs_native
from helpers.tiny_models import build, prompt
from torch import Tensor, nn

from trimaran.kernels_cpu import library as native
from trimaran.kernels_cpu.library import ISAS

pytestmark = [
    needs_native,
    pytest.mark.timeout(900),  # the first to need a build waits for a minute of compiling
    pytest.mark.real,
]

CHILD = Path(__file__).parents[1] / "helpers" / "isa_child.py"
VOCAB, LAYERS = 1024, 3
LINEARS = 4 * LAYERS + 1
PROMPTS = [prompt(length, length, VOCAB) for length in (530, 9, 33)]
"""More rows than any kernel's crossover to AMX tiles, decoded by fewer; the longest goes beyond the
keys at which attention is cut, so that several threads share it."""
SIZES = {"vocab_size": VOCAB, "max_position_embeddings": 1024}


class Bound(NamedTuple):
    """Of errors in log-probabilities, whose standard deviation here is 1.7."""

    rms: float
    largest: float


BOUNDS = {"bf16": Bound(0.035, 0.25), "int8": Bound(0.09, 0.6)}
"""What the precisions themselves cost: transformers in bf16 throughout, its linears' inputs rounded
to int8 for the second, is off by 0.027 and 0.070 (`test_bounds_are_what_the_precision_costs`)."""


# -- transformers --------------------------------------------------------------------------------


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="trimaran-aligned-")


@functools.cache
def model() -> str:
    """A folder with it in bf16; every size is a multiple of what the kernels work on at once."""
    build("qwen3", **SIZES).to(torch.bfloat16).save_pretrained(_folder().name)
    return _folder().name


def in_int8(weight: Tensor) -> Tensor:
    """Rows rounded to 255 steps, in fp32."""
    scales = weight.float().abs().amax(-1, keepdim=True) / 127
    return (weight.float() / scales).round() * scales


def rounds_inputs(linear: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (in_int8(inputs[0]).to(inputs[0].dtype),)


@functools.cache
def reference(precision: str, dtype: torch.dtype) -> Any:
    """The model with the weights that `precision` stands for, computed in `dtype`; below fp64 with
    rounded inputs as well."""
    # Never cast to bf16 as a whole, which would round the frequencies of RoPE.
    made = transformers.AutoModelForCausalLM.from_pretrained(model(), dtype=torch.bfloat16).eval()
    quantized = [one for one in made.modules() if isinstance(one, nn.Linear)]
    weights = [in_int8(one.weight.data) for one in quantized]
    if dtype == torch.float64:
        made.double()
    if precision == "int8":
        for linear, weight in zip(quantized, weights, strict=True):
            linear.weight.data = weight.to(dtype)
            if dtype != torch.float64:
                linear.register_forward_pre_hook(rounds_inputs)
    return made


def tables(precision: str, dtype: torch.dtype, tokens: list[list[int]]) -> list[Tensor]:
    """Log-probabilities after each token of the prompts and of `tokens` but the last."""
    made = reference(precision, dtype)
    with torch.inference_mode():
        return [
            made(torch.tensor([ids + more[:-1]])).logits[0].double().log_softmax(-1)
            for ids, more in zip(PROMPTS, tokens, strict=True)
        ]


def error(got: list[Tensor], exact: list[Tensor]) -> Bound:
    difference = torch.cat(got).double() - torch.cat(exact)
    return Bound(float(difference.square().mean().sqrt()), float(difference.abs().max()))


# -- the engine ----------------------------------------------------------------------------------


@functools.cache
def emulated() -> str:
    """The library with all instruction sets; empty: the installed one has them."""
    if native.library().detected == ISAS[-1]:
        return ""
    return str(build_of("emulated-library"))


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int], Found]:
    """(precision, threads) → what the instruction set in `request.param` made of it."""
    environment = {**os.environ, native.CAP: request.param}
    if emulated():
        environment[native.OTHER] = emulated()
    folder = tmp_path_factory.mktemp(request.param)
    asked, target = folder / "prompts.json", folder / "found.pt"
    asked.write_text(json.dumps(PROMPTS))
    done = subprocess.run(
        [sys.executable, CHILD, model(), asked, target],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {(one["precision"], one["threads"]): one for one in torch.load(target)}


def each_isa(test: Any) -> Any:
    return pytest.mark.parametrize("runs", ISAS[1:], indirect=True, scope="module")(test)


@each_isa
@pytest.mark.parametrize("precision", PRECISIONS)
def test_log_probabilities_are_those_of_fp64_within_bounds(
    runs: dict[tuple[str, int], Found], precision: str
) -> None:
    found, bound = runs[precision, 1], BOUNDS[precision]
    assert [len(tokens) for tokens in found["tokens"]] == [NUM_TOKENS] * len(PROMPTS)
    exact = tables(precision, torch.float64, found["tokens"])
    made = error(found["tables"], exact)
    assert made.rms <= bound.rms and made.largest <= bound.largest, made
    sure = 0
    for tokens, table in zip(found["tokens"], exact, strict=True):
        for token, row in zip(tokens, table[-NUM_TOKENS:], strict=True):
            best, second = row.topk(2).values.tolist()
            if best - second > 2 * bound.largest:  # no error within the bound turns it round
                assert token == int(row.argmax())
                sure += 1
    assert sure >= 3


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bounds_are_what_the_precision_costs(precision: str) -> None:
    """Another implementation of the same precision is within them, and uses most of them."""
    bound = BOUNDS[precision]
    tokens = [prompt(NUM_TOKENS, 90 + i, VOCAB) for i in range(len(PROMPTS))]
    exact = tables(precision, torch.float64, tokens)
    own = error(tables(precision, torch.bfloat16, tokens), exact)
    assert bound.rms / 1.5 < own.rms < bound.rms, own
    assert bound.largest / 2 < own.largest < bound.largest, own


@each_isa
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_kernels_are_those_of_the_instruction_set(
    runs: dict[tuple[str, int], Found], precision: str, request: pytest.FixtureRequest
) -> None:
    isa = request.node.callspec.params["runs"]
    found = runs[precision, 1]
    own = found["counts"][isa]
    others = [kernels for other, kernels in found["counts"].items() if other != isa]
    assert not any(number for kernels in others for number in kernels.values())
    unused = {"linear_int8"} if precision == "bf16" else {"linear_dense"}
    assert {kernel for kernel in KERNELS if not own[kernel]} == unused
    linear = own["linear_dense"] + own["linear_int8"]
    assert linear >= LINEARS * NUM_TOKENS and own["attention"] >= LAYERS * NUM_TOKENS
    # Attention has tiles ready in each call; more uses are linears of the prompts.
    prefill = found["tile_uses"] - own["attention"] if isa == "amx" else LINEARS
    assert prefill >= LINEARS - 1, "all but the head"
    assert isa == "amx" or not found["tile_uses"]


@each_isa
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_number_of_threads_changes_no_bit(
    runs: dict[tuple[str, int], Found], precision: str
) -> None:
    alone, *others = (runs[precision, threads] for threads in THREADS)
    for other in others:
        assert other["tokens"] == alone["tokens"]
        for a, b in zip(other["tables"], alone["tables"], strict=True):
            assert torch.equal(a, b)
