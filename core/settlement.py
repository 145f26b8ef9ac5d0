"""What a finished step means: tokens and their stops, blocks for good, failures, final outputs."""

from __future__ import annotations

from .admission import Quarantine
from .engine.messages import BeamOutput, SequenceOutput
from .errors import EngineDeadError
from .kv.manager import KVManager
from .plan import StepOutput
from .request import Request, Status
from .sequences import Sequences, StepInFlight
from .types import FinishReason, PositionLogprobs

NOT_FINITE = "The model's logits were not finite for this sequence; nothing of it is cached."
NO_TOKEN_LEFT = "allowed_token_ids, bad_words and min_tokens together leave no token to go on with."

MAX_FAILED_STEPS = 8
MIN_FAILED_PROMPTS = 3
"""So many steps that failed in a row, of so many prompts, are not the fault of a request."""
MAX_FAILED_NOTICES = 32
"""Nor are so many in a row that only told the runner something."""


class FailureStreak:
    """Failed steps without a good one in between, and what they were about. Steps that only tell
    the runner something are counted by themselves: they may not even touch the device."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.num_notices = 0
        self._prompts: set[bytes] = set()

    @property
    def hopeless(self) -> bool:
        """Rather the device is broken: steps of any request would fail."""
        several = self.num_steps >= MAX_FAILED_STEPS and len(self._prompts) >= MIN_FAILED_PROMPTS
        return several or self.num_notices >= MAX_FAILED_NOTICES

    def add(self, prompts: set[bytes]) -> None:
        """A step failed, and with it these prompts: none if they had ended before."""
        self.num_steps += bool(prompts)
        self._prompts |= prompts

    def end(self) -> None:
        self.num_steps = self.num_notices = 0
        self._prompts.clear()


class Settlement:
    """Takes the outputs of steps, and collects what the front end has to be told."""

    def __init__(self, kv: KVManager, sequences: Sequences, quarantine: Quarantine) -> None:
        self._kv = kv
        self._sequences = sequences
        self._quarantine = quarantine
        self._streak = FailureStreak()
        self._outputs: list[SequenceOutput] = []

    def settle(self, step: StepInFlight, output: StepOutput) -> list[BeamOutput]:
        """Account for a step that is over, and free the blocks that were left to it. Raises
        EngineDeadError when steps fail whatever they compute."""
        beams: list[BeamOutput] = []
        if output.error is not None:
            self._fail_step(step, output.error)
        elif output.logprobs or output.prompt_logprobs or output.failed:
            self._take_rows_with_extras(step, output, beams)
        else:
            self._take_rows(step, output)
        if not step.requests:
            self._streak.num_notices = self._streak.num_notices + 1 if output.error else 0
        elif output.error is None:
            self._streak.end()
        self._kv.end_step(step.plan.step_id)
        if self._streak.hopeless:
            raise EngineDeadError(
                f"{max(self._streak.num_steps, self._streak.num_notices)} steps in a row failed, "
                f"not of one request: the device seems to be broken; at last: {output.error}"
            )
        return beams

    def _take_rows(self, step: StepInFlight, output: StepOutput) -> None:
        """The hot loop: rows that yielded tokens and nothing else."""
        plan = step.plan
        for request, start, count, emits, tokens in zip(
            step.requests, plan.starts, plan.counts, plan.emits, output.tokens, strict=True
        ):
            if request.status is Status.FINISHED:
                continue  # it ended while this step was in flight: its output is discarded
            self._settle(step, request, start + count, emits)
            if emits:
                self._take_tokens(step, request, tokens)

    def _take_rows_with_extras(
        self, step: StepInFlight, output: StepOutput, beams: list[BeamOutput]
    ) -> None:
        """The same where some rows failed or report log-probabilities."""
        plan = step.plan
        for i, request in enumerate(step.requests):
            if i in output.failed:
                self._fail_row(request)
            if request.status is Status.FINISHED:
                continue
            self._settle(step, request, plan.starts[i] + plan.counts[i], plan.emits[i])
            logprobs = output.logprobs.get(i)
            if plan.emits[i] and not request.yields:
                assert request.controller is not None and logprobs
                result = request.controller.reported(request, logprobs)
                if result:
                    beams.append(result)
                    self._quarantine.served(request)
                continue
            prompt_logprobs = self._fresh_prompt_logprobs(
                request, plan.starts[i], output.prompt_logprobs.get(i)
            )
            if plan.emits[i]:
                tokens = output.tokens[i]
                self._take_tokens(step, request, tokens, logprobs, prompt_logprobs)
            elif prompt_logprobs:
                self._emit(request, [], None, prompt_logprobs)

    def _settle(self, step: StepInFlight, request: Request, end: int, emits: bool) -> None:
        """The first `end` tokens of the sequence are in the cache, unless it gave up its blocks
        after the step was planned."""
        if step.stale and request in step.stale:
            return
        if request.controller is not None:
            # Before the commit: what is forked off may need a block that now leaves the window.
            request.controller.computed(request, end)
        if end >= request.kv.next_commit:
            self._kv.commit(request.kv, request.tokens, end)
        if emits:
            request.num_verified = end

    def _take_tokens(
        self,
        step: StepInFlight,
        request: Request,
        tokens: list[int],
        logprobs: list[PositionLogprobs] | None = None,
        prompt_logprobs: list[PositionLogprobs] | None = None,
    ) -> None:
        """A row yielded 0 … k tokens. Those behind a stop are discarded."""
        if request in step.void:
            return
        request.num_pending -= request.yields
        reason, kept = None, 0
        for token in tokens:
            reason = request.append(token)
            kept += 1
            if reason is not None:
                break
        if kept == 0:
            self._step_back(request)
            if not prompt_logprobs:
                return
        elif kept < len(tokens):
            tokens = tokens[:kept]
            logprobs = logprobs and logprobs[:kept]
        self._sequences.num_tokens_generated += kept
        final = self._emit(request, tokens, logprobs, prompt_logprobs)
        if reason is not None:
            final.finish_reason, final.stop_reason = reason, request.stop_reason
            self._sequences.end(request, reason)
            self._quarantine.served(request)

    def _step_back(self, request: Request) -> None:
        """A row that was to yield did not: its last token is computed again, and what later steps
        make of the token that never came is void."""
        if request.status is Status.RUNNING and self._sequences.is_in_flight(request):
            for later in self._sequences.in_flight:
                later.void.add(request)
                later.stale.add(request)
            request.num_pending = 0
        request.num_computed = min(request.num_computed, len(request.tokens) - 1)

    def _fresh_prompt_logprobs(
        self, request: Request, start: int, found: list[PositionLogprobs] | None
    ) -> list[PositionLogprobs] | None:
        """Those that were not reported yet: after a preemption the prompt is computed again."""
        if not found:
            return None
        fresh = found[max(0, request.num_prompt_logprobs - start) :]
        request.num_prompt_logprobs = max(request.num_prompt_logprobs, start + len(found))
        return fresh or None

    # ---------------------------------------------------------------- ends and outputs

    def _fail_row(self, request: Request) -> None:
        """NaN logits: the blocks may hold NaN, so they leave the index and are scrubbed, also if
        the sequence has ended meanwhile. Or else no token was left to draw: the sampler reports
        both alike, and only the words differ."""
        self._kv.taint(request.kv, request.num_verified)
        if request.finished:
            return
        allowed = request.origin.params.allowed_token_ids
        generated = request.tokens[request.num_prompt :]
        own_fault = allowed and request.origin.own_bans(generated).issuperset(allowed)
        self.end(request, FinishReason.ERROR, NO_TOKEN_LEFT if own_fault else NOT_FINITE)

    def _fail_step(self, step: StepInFlight, error: str) -> None:
        """The forward raised: all requests of the step end, and what they wrote is not trusted.
        Others with the same prompts, which wait for their turn, are suspects from now on."""
        self._sequences.remove_again(step.plan.removed)
        for request in step.requests:
            self._kv.taint(request.kv, request.num_verified)
        alone = len({request.request_id for request in step.requests}) == 1
        prompts: set[bytes] = set()
        for request in step.requests:
            if request.request_id in self._sequences.by_id and not request.finished:
                prompts.add(self._quarantine.failed(request, alone))
                self.end_request(request.request_id, FinishReason.ERROR, error)
        self._streak.add(prompts)
        for children in self._sequences.by_id.values():
            self._quarantine.watch(children)
            self._sequences.note_suspects(children)

    def end_request(self, request_id: str, reason: FinishReason, error: str | None = None) -> None:
        for child in self._sequences.by_id.get(request_id, [])[:]:
            if not child.finished:  # the end of one beam is the end of all
                self.end(child, reason, error)

    def end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        self._sequences.end(request, reason)
        final = self._emit(request, [], None, None)
        final.finish_reason, final.error = reason, error
        if request.origin.beam is not None:
            final.index = 0  # a search has one output

    def _emit(
        self,
        request: Request,
        tokens: list[int],
        logprobs: list[PositionLogprobs] | None,
        prompt_logprobs: list[PositionLogprobs] | None,
    ) -> SequenceOutput:
        output = SequenceOutput(
            request.request_id, request.index, tokens, logprobs, prompt_logprobs
        )
        output.num_preemptions = request.num_preemptions
        if not request.reported_cached:
            request.reported_cached = True
            output.num_cached = request.num_cached
            output.first_scheduled = request.first_scheduled
        self._outputs.append(output)
        return output

    def drain_outputs(self) -> list[SequenceOutput]:
        """Outputs that came up outside an update: of aborted and finished sequences."""
        outputs, self._outputs = self._outputs, []
        return outputs
