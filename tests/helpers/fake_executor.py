"""An executor without a model: the next token is a function of all the tokens before it."""

from collections.abc import Callable

import torch

from trimaran.core.config import (
    CacheConfig,
    CacheGroupConfig,
    EngineConfig,
    ModelSpec,
    ParallelConfig,
    PlatformChoice,
    SchedulerConfig,
)
from trimaran.core.plan import StepOutput, StepPlan
from trimaran.core.types import PositionLogprobs

VOCAB = 300


def next_token(tokens: list[int], salt: int = 0) -> int:
    """Some token that depends on every one before it."""
    value = salt
    for token in tokens:
        value = (value * 31 + token + 7) % 1_000_003
    return 4 + value % (VOCAB - 4)


def continuation(prompt: list[int], count: int, salt: int = 0) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, salt))
    return tokens[len(prompt) :]


class FakeHandle:
    """A step that is computed when it is submitted, as on a device with one queue."""

    def __init__(self, output: StepOutput, error: BaseException | None) -> None:
        self._output = output
        self._error = error

    def result(self) -> StepOutput:
        if self._error is not None:
            raise self._error
        return self._output

    def done(self) -> bool:
        return True


class FakeExecutor:
    """`on_submit(step number, plan)` and `on_result` may raise."""

    description = {"platform": "fake"}

    def __init__(
        self,
        on_submit: Callable[[int, StepPlan], None] | None = None,
        on_result: Callable[[int, StepPlan], None] | None = None,
        next_of: Callable[[list[int], int], int] = next_token,
    ) -> None:
        self._on_submit = on_submit or (lambda number, plan: None)
        self._on_result = on_result or (lambda number, plan: None)
        self._next_of = next_of
        self._rows: dict[int, list[int]] = {}
        self._salts: dict[int, int] = {}
        self._logprobs: dict[int, int | None] = {}
        self.num_steps = 0
        self.closed = False

    def submit(self, plan: StepPlan) -> FakeHandle:
        number, self.num_steps = self.num_steps, self.num_steps + 1
        for row in plan.removed:
            self._rows.pop(row, None)
        for new in plan.added:
            self._rows[new.row] = list(new.token_ids)
            self._salts[new.row] = new.sampling.child_index
            self._logprobs[new.row] = new.sampling.logprobs
        self._on_submit(number, plan)
        output = StepOutput(plan.step_id, [])
        for i, (row, emits) in enumerate(zip(plan.rows, plan.emits, strict=True)):
            output.tokens.append([])
            if emits:
                table = self._rows[row]
                table.append(self._next_of(table, self._salts[row]))
                output.tokens[-1].append(table[-1])
                if self._logprobs[row] is not None:
                    output.logprobs[i] = [
                        PositionLogprobs([table[-1], table[-1], 5], [-0.5, -0.5, -1.5], [1, 1, 2])
                    ]
        error: BaseException | None = None
        try:
            self._on_result(number, plan)
        except BaseException as raised:
            error = raised
        return FakeHandle(output, error)

    def close(self) -> None:
        self.closed = True


def fake_config(path, **scheduler: object) -> EngineConfig:
    """A configuration around `path`, where a tokenizer is."""
    limits = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    return EngineConfig(
        model=ModelSpec(
            path=path,
            name="fake",
            hf_config={},
            dtype=torch.float32,
            max_model_len=256,
            vocab_size=400,
            tokenizer_path=path,
            generation={},
            eos_token_ids=(1,),
            load_format="dummy",
            seed=0,
            max_logprobs=20,
            logprobs_mode="raw",
        ),
        cache=CacheConfig(
            groups=(CacheGroupConfig(name="full", layers=(0,), block_size=4, num_blocks=257),),
            dtype=torch.float32,
        ),
        scheduler=SchedulerConfig(**{**limits, **scheduler}),
        parallel=ParallelConfig(),
        platform=PlatformChoice(name="fake"),
    )
