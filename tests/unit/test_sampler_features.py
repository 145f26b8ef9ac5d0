"""Each sampling feature against a slow, obvious reference, over several steps and re-additions."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from trimaran.core.plan import NewRow, RowSampling
from trimaran.core.sampler.sampler import Sampler
from trimaran.platforms.host_device import HostDevice
from trimaran.platforms.interface import Device
from trimaran.platforms.strict_device import StrictDevice

VOCAB = 23
LENGTH = 64
BANNED = -float("inf")


def process(logits: Tensor, asked: RowSampling, prompt: list[int], output: list[int]) -> Tensor:
    """One row's logits by the definitions, in the documented order."""
    logits = logits.clone()
    if asked.allowed_token_ids is not None:
        for token in set(range(VOCAB)) - set(asked.allowed_token_ids):
            logits[token] = BANNED
    for *prefix, last in asked.bad_words_ids:
        if not prefix or output[-len(prefix) :] == prefix:
            logits[last] = BANNED
    if len(output) < asked.min_tokens:
        logits[asked.suppress_ids] = BANNED
    for token, bias in asked.logit_bias.items():
        logits[token] += bias
    for token in range(VOCAB):
        if token in prompt or token in output:
            factor = asked.repetition_penalty
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        logits[token] -= asked.frequency_penalty * output.count(token)
        logits[token] -= asked.presence_penalty * (token in output)
    return logits


FEATURES = {
    "nothing": RowSampling(temperature=0.0),
    "allowed": RowSampling(temperature=0.0, allowed_token_ids=[2, 3, 5, 7, 11, 13]),
    "bad words": RowSampling(
        temperature=0.0,
        bad_words_ids=[
            [4],
            [5, 6],
            [6, 6],
            [1, 2, 3],
            [7, 6],
            *([t, 9] for t in range(0, VOCAB, 2)),
        ],
    ),
    "min tokens": RowSampling(temperature=0.0, min_tokens=4, suppress_ids=[0, 8, 9, 10]),
    "bias": RowSampling(temperature=0.0, logit_bias={3: 4.0, 4: -100.0, 5: 1.5}),
    "repetition": RowSampling(temperature=0.0, repetition_penalty=1.7),
    "frequency": RowSampling(temperature=0.0, frequency_penalty=1.2),
    "presence": RowSampling(temperature=0.0, presence_penalty=-0.8),
    "all": RowSampling(
        temperature=0.0,
        allowed_token_ids=list(range(1, 20)),
        bad_words_ids=[[2], [3, 4]],
        min_tokens=5,
        suppress_ids=[6],
        logit_bias={7: 1.0},
        repetition_penalty=0.8,
        frequency_penalty=0.5,
        presence_penalty=0.5,
    ),
}


def add_row(device: Device, sampler: Sampler, tokens: Tensor, new: NewRow) -> None:
    works = sampler.add(new)
    known = torch.tensor(new.token_ids, dtype=torch.int32)

    def work() -> None:
        for part in works:
            part()
        tokens[new.row, : len(known)] = known

    device.launch(work)


@pytest.mark.parametrize("kind", ["host", "strict"])
def test_features_over_steps_with_rows_coming_and_going(kind: str) -> None:
    """Rows join, are preempted, and return with their output on another row, two steps in flight
    on the asynchronous device."""
    device: Device = HostDevice() if kind == "host" else StrictDevice(0, 0.0)
    try:
        for seed in range(4):
            _random_program(device, random.Random(seed))
    finally:
        device.close()


def _random_program(device: Device, rng: random.Random) -> None:
    rows = 6
    tokens = device.alloc((rows, LENGTH), torch.int32, tag="test")
    device.launch(lambda: tokens.zero_() and None)
    sampler = Sampler(device, tokens, VOCAB)
    names = [*FEATURES, "all", "bad words", "repetition"]
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 6))] for _ in names]
    outputs: list[list[int]] = [[] for _ in names]
    placed: dict[int, int] = {}  # request → row
    for step in range(30):
        for request in [r for r in placed if rng.random() < 0.15]:
            sampler.remove(placed.pop(request))
        free = sorted(set(range(rows)) - set(placed.values()))
        rng.shuffle(free)
        waiting = [r for r in range(len(names)) if r not in placed]
        rng.shuffle(waiting)
        for request, row in zip(waiting, free, strict=False):
            placed[request] = row
            prompt = prompts[request]
            known = prompt + outputs[request]
            new = NewRow(row, known, len(prompt), [[]], FEATURES[names[request]])
            add_row(device, sampler, tokens, new)
        batch = [r for r in placed if rng.random() < 0.8] or [next(iter(placed))]
        logits = torch.randn(len(batch), VOCAB, generator=torch.Generator().manual_seed(step)) * 2
        used = np.array([placed[r] for r in batch])
        positions = np.array([len(prompts[r]) + len(outputs[r]) for r in batch])
        staged = sampler.stage(used, positions)
        drawn: list[Tensor] = []

        def work(staged=staged, logits=logits, used=used, positions=positions, drawn=drawn):
            sampled = staged.run(logits.clone())
            tokens[used, positions] = sampled.token_ids.int()
            drawn.append(sampled.token_ids)

        device.launch(work).wait()
        for i, request in enumerate(batch):
            asked, prompt, output = FEATURES[names[request]], prompts[request], outputs[request]
            expected = process(logits[i], asked, prompt, output).argmax().item()
            assert drawn[0][i].item() == expected, (names[request], step)
            output.append(int(expected))


def test_slots_grow_and_are_reused() -> None:
    device = HostDevice()
    tokens = torch.zeros((16, LENGTH), dtype=torch.int32)
    sampler = Sampler(device, tokens, VOCAB)
    asked = RowSampling(temperature=0.0, frequency_penalty=2.0)
    for row in range(16):
        add_row(device, sampler, tokens, NewRow(row, [0, row], 1, [[]], asked))
    logits = torch.zeros(16, VOCAB)
    expected = [0 if row else 1 for row in range(16)]  # its own output is pushed down
    found = sampler.stage(np.arange(16), np.full(16, 2)).run(logits.clone())
    assert found.token_ids.tolist() == expected
    for row in range(16):
        sampler.remove(row)
        add_row(device, sampler, tokens, NewRow(row, [0], 1, [[]], asked))
    found = sampler.stage(np.arange(16), np.full(16, 1)).run(logits.clone())
    assert found.token_ids.tolist() == [0] * 16


def test_a_bad_word_never_matches_into_the_prompt() -> None:
    device = HostDevice()
    tokens = torch.zeros((2, LENGTH), dtype=torch.int32)
    sampler = Sampler(device, tokens, VOCAB)
    asked = RowSampling(temperature=0.0, bad_words_ids=[[5, 6]])
    add_row(device, sampler, tokens, NewRow(0, [4, 5], 2, [[]], asked))
    add_row(device, sampler, tokens, NewRow(1, [4, 5], 1, [[]], asked))
    logits = torch.zeros(2, VOCAB)
    logits[:, 6] = 1.0
    found = sampler.stage(np.array([0, 1]), np.array([2, 2])).run(logits)
    assert found.token_ids.tolist() == [6, 0]


def test_ids_outside_the_vocabulary_do_no_harm() -> None:
    device = HostDevice()
    tokens = torch.zeros((1, LENGTH), dtype=torch.int32)
    sampler = Sampler(device, tokens, VOCAB)
    asked = RowSampling(
        temperature=0.0,
        logit_bias={VOCAB: 1.0, -1: 1.0},
        allowed_token_ids=[3, VOCAB + 5],
        bad_words_ids=[[VOCAB]],
        min_tokens=1,
        suppress_ids=[VOCAB],
    )
    add_row(device, sampler, tokens, NewRow(0, [0], 1, [[]], asked))
    found = sampler.stage(np.array([0]), np.array([1])).run(torch.zeros(1, VOCAB))
    assert found.token_ids.tolist() == [3]


def test_a_step_without_features_stages_none() -> None:
    sampler = Sampler(HostDevice(), torch.zeros((4, 4), dtype=torch.int32), VOCAB)
    sampler.add(NewRow(0, [0], 1, [[]], RowSampling(temperature=0.0)))
    sampler.add(NewRow(1, [0], 1, [[]], RowSampling(logit_bias={1: 1.0})))
    staged = sampler.stage(np.array([0]), np.array([1]))
    assert not staged.features and staged.drawing is None
    assert sampler.stage(np.array([1]), np.array([1])).features
