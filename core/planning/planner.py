"""`plan`: one model on one device, from facts alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from ...platforms.interface import Finding
from ..args import EngineArgs, parse_size
from ..dtypes import dtype_name
from ..errors import PlatformError
from ..models.spec import DecoderSpec, LayerGroup
from ..ops import OpBinder
from ..sizing import GroupSize, default_budget, longest_that_fits, measure_groups, sequence_bytes
from .limits import PREFILL_TOKENS, Load
from .memory import (
    RankMemory,
    activation_bytes,
    rank_memory,
    recorded_rows,
    recording_bytes,
    shape_groups,
)
from .model import ModelFacts, Parameters
from .report import BYTES, TOKENS, Figure, Plan, Section
from .settings import Settings, choose_settings, review
from .targets import Target

NOT_COUNTED = (
    "not counted: the interpreter and libraries (the process before it loads anything), what an "
    "implementation takes inside one op, log-probabilities of prompts, and rows of penalties"
)
FIXED = ("weights", "step buffers", "rows", "activations", "recordings")
"""What is held beside the KV cache, whatever its size."""
BLOCK = 32
UNBOUNDED = 1 << 40


def plan(facts: ModelFacts, args: EngineArgs, target: Target, context: int | None = None) -> Plan:
    """What `facts` needs on `target` with `args`, and what it can give; `context`: tokens of the
    sequences that batches are planned for. Raises TrimaranError where the platform cannot run it
    in this way at all."""
    settings = _settle(facts, args, target, context)
    findings = review(args, settings, target)
    changes = {one.field: one.value for one in findings if one.kind == "adjust"}
    if changes:
        args = dataclasses.replace(args, **changes)
        settings = _settle(facts, args, target, context)
    return _Planner(facts, args, target, settings, findings).plan()


def _settle(facts: ModelFacts, args: EngineArgs, target: Target, context: int | None) -> Settings:
    def fit(longest: Settings) -> int:
        return _Planner(facts, args, target, longest, ()).length_in_memory()

    return choose_settings(facts, args, target, context, fit)


class _Planner:
    """One pass; every method fills one section."""

    def __init__(
        self,
        facts: ModelFacts,
        args: EngineArgs,
        target: Target,
        settings: Settings,
        findings: Sequence[Finding],
    ) -> None:
        self._facts = facts
        self._args = args
        self._target = target
        self._settings = settings
        self._findings = tuple(findings)
        self._notes: list[str] = list(facts.remarks)
        self._memory: RankMemory | None = None
        if facts.spec is None:
            self._notes.append(
                "not runnable by this engine yet: figures only. Weights are taken as "
                f"{dtype_name(settings.dtype)}, neither packed nor quantized. {facts.obstacle}"
            )
            self._sizes, self._kv_source = [self._plain_group()], "config.json, no platform's block"
        else:
            binder = OpBinder(target.platform, quantization=settings.quantization)
            self._sizes, self._kv_source = self._measure(facts.spec)
            self._memory = self._rank_memory(facts.spec, binder)
            self._notes += binder.remarks
        shapes = facts.shapes if self._memory is None else self._memory.shapes
        self._parameters: Parameters = facts.parameters(shapes)

    def plan(self) -> Plan:
        facts, settings, target = self._facts, self._settings, self._target
        self._check_headers()
        held = self._held()
        sections: dict[str, Section] = {
            "parameters": self._counts(),
            "memory": held,
            "fits": self._fits(held),
        }
        sections["limits"] = self._limits(sections["fits"])
        self._notes.append(NOT_COUNTED)
        return Plan(
            model=facts.name,
            architecture=facts.architecture,
            runnable=facts.spec is not None,
            platform=target.platform.name,
            device=target.title,
            present=target.present,
            settings=settings.named() | {"context": settings.context},
            sections=sections,
            findings=self._findings,
            notes=tuple(self._notes),
        )

    def length_in_memory(self) -> int:
        """Tokens of the longest sequence that fits beside what is held, as `auto` takes them."""
        limit = self._settings.lengths.max_model_len
        if not self._target.memory.total and self._args.kv_cache_memory_bytes is None:
            return limit
        return longest_that_fits(self._sizes, self._budget(self._held())[0], limit)

    # -- what is held --------------------------------------------------------------------------

    def _measure(self, spec: DecoderSpec) -> tuple[list[GroupSize], str]:
        settings = self._settings
        try:
            sizes = measure_groups(
                self._target.platform,
                spec,
                dtype=settings.dtype,
                kv_dtype=settings.kv_dtype,
                block_size=settings.block_size,
                ranks=settings.ranks,
                attention_backend=self._args.attention_backend,
            )
            return sizes, "the platform's attention: bytes of a block"
        except PlatformError:
            if self._target.present:
                raise
        self._notes.append("the platform's attention does not answer without its device")
        block = settings.block_size or BLOCK
        kv_heads = spec.rank_heads(settings.ranks)[1]
        token = 2 * kv_heads * spec.head_dim * settings.kv_dtype.itemsize
        groups = spec.cache_groups()
        sizes = [GroupSize(group, block, token * block * len(group.layers)) for group in groups]
        return sizes, "keys and values of every head, by config.json"

    def _plain_group(self) -> GroupSize:
        """A cache of blocks without padding, for models that have no layers here."""
        (shape,) = self._facts.attention
        # Ranks keep different heads; a compressed vector is kept by each.
        heads = int(self._facts.config.get("num_key_value_heads") or 1)
        split = 1 if self._facts.config.get("kv_lora_rank") else min(self._settings.ranks, heads)
        share = shape.kv_elements * self._settings.kv_dtype.itemsize // split
        group = LayerGroup("full", tuple(range(shape.layers)), shape.window)
        return GroupSize(group, BLOCK, share * BLOCK * shape.layers)

    def _rank_memory(self, spec: DecoderSpec, binder: OpBinder) -> RankMemory:
        settings = self._settings
        groups = shape_groups(
            spec,
            self._target.platform,
            self._sizes,
            dtype=settings.dtype,
            kv_dtype=settings.kv_dtype,
            ranks=settings.ranks,
        )
        return rank_memory(
            spec,
            binder,
            groups,
            dtype=settings.dtype,
            ranks=settings.ranks,
            max_tokens=settings.lengths.step_tokens,
            max_model_len=settings.lengths.max_model_len,
            num_seqs=settings.lengths.num_seqs,
        )

    def _check_headers(self) -> None:
        """Say where the checkpoint is not what the loader will ask for."""
        stored, spec = self._facts.stored, self._facts.spec
        if stored is None or spec is None or self._memory is None:
            return
        wrong = [
            name for name, shape in self._memory.shapes.items() if stored.shapes.get(name) != shape
        ]
        if wrong:
            self._notes.append(
                f"the checkpoint will not load: {len(wrong)} of its tensors are missing or have "
                f"another shape than config.json says ({', '.join(wrong[:3])}…)"
            )

    def _counts(self) -> Section:
        one, stored = self._parameters, self._facts.stored
        source = "config.json" if stored is None else "config.json and safetensors headers"
        if self._facts.spec is None:
            source = "transformers' modules for config.json"
        figures = {
            "parameters": Figure(one.total, "elements", source),
            "embedding": Figure(one.embedding, "elements", source),
            "head": Figure(one.head, "elements", "the embedding's table" if one.tied else source),
            "body": Figure(one.body, "elements", source),
            "used by a token": Figure(
                one.active_body + one.head,
                "elements",
                f"body and head, {one.routed:.3g} of {one.experts} in experts"
                if one.experts
                else "body and head",
            ),
        }
        if stored is not None:
            figures["checkpoint"] = Figure(
                stored.size, BYTES, f"safetensors headers: {', '.join(stored.dtypes)}"
            )
        return figures

    def _held(self) -> Section:
        settings, memory = self._settings, self._memory
        kv_token = sum(size.block_bytes / size.block_size for size in self._sizes)
        if memory is None:
            size = self._parameters.total * settings.dtype.itemsize / settings.ranks
            weights = {
                "weights": Figure(size, BYTES, f"parameters in {dtype_name(settings.dtype)}")
            }
            unknown = Figure(None, BYTES, "unknown: no layers for it here yet")
            steps = dict.fromkeys(FIXED[1:], unknown)
        else:
            assert self._facts.spec is not None
            weights, steps = self._weights_of(memory), self._steps_of(memory, self._facts.spec)
        return {
            **weights,
            "KV a token": Figure(kv_token, BYTES, self._kv_source),
            **{
                f"KV block, {size.group.name}": Figure(
                    size.block_bytes,
                    BYTES,
                    f"{size.block_size} tokens in {len(size.group.layers)} layers",
                )
                for size in self._sizes
            },
            **steps,
        }

    def _weights_of(self, memory: RankMemory) -> dict[str, Figure]:
        packed, table = "head included", "kept as it is, to be looked up in"
        if not memory.embedding:
            table = "the head as it is packed"
        elif memory.held_once:
            packed = "the head is the embedding's table"
        return {
            "weights": Figure(memory.weights, BYTES, "the four below"),
            "matrices": Figure(memory.matrices, BYTES, f"as the platform packs them, {packed}"),
            "embedding": Figure(memory.embedding, BYTES, table),
            "norms and biases": Figure(memory.vectors, BYTES, "the decoder's own tensors"),
            "rope table": Figure(memory.rope, BYTES, "fp32, a row a position of max_model_len"),
        }

    def _steps_of(self, memory: RankMemory, spec: DecoderSpec) -> dict[str, Figure]:
        settings = self._settings
        tokens, seqs = settings.lengths.step_tokens, settings.lengths.num_seqs
        activations = activation_bytes(
            spec, settings.dtype, ranks=settings.ranks, tokens=tokens, logits=seqs
        )
        source = f"the widest point of a step of {tokens} tokens, {seqs} rows of logits"
        return {
            "step buffers": Figure(memory.step, BYTES, f"{tokens} tokens"),
            "rows": Figure(memory.rows, BYTES, f"{seqs} sequences and one spare"),
            "activations": Figure(activations, BYTES, source),
            "recordings": self._recordings(spec),
        }

    def _recordings(self, spec: DecoderSpec) -> Figure:
        settings = self._settings
        rows = recorded_rows(
            self._args, self._target.capabilities, settings.lengths, settings.ranks
        )
        source = f"the largest recorded step, {rows} rows" if rows else "no step is recorded"
        return Figure(recording_bytes(spec, settings.dtype, rows), BYTES, source)

    # -- what fits -----------------------------------------------------------------------------

    def _fits(self, held: Section) -> Section:
        memory = self._target.memory
        if not memory.total:
            unknown = Figure(None, TOKENS, "unknown: the platform does not say its memory")
            return {"memory for KV": unknown, "largest context": unknown, "largest batch": unknown}
        budget, source = self._budget(held)
        return {
            "device memory": Figure(memory.total, BYTES, "the platform"),
            "free memory": Figure(
                memory.free, BYTES, "now" if self._target.present else "all of it, if nothing runs"
            ),
            "memory for KV": Figure(max(0, budget), BYTES, source),
            "largest context": self._longest(budget),
            "largest batch": self._batch(budget),
        }

    def _budget(self, held: Section) -> tuple[int, str]:
        """Bytes of one rank's cache, and by which rule."""
        memory, args, ranks = self._target.memory, self._args, self._settings.ranks
        if args.kv_cache_memory_bytes is not None:
            wanted = parse_size(args.kv_cache_memory_bytes, "kv_cache_memory_bytes")
            return wanted, "kv_cache_memory_bytes"
        on_host, share = self._target.capabilities.unified_memory, args.gpu_memory_utilization
        fixed = int(sum(held[name].value or 0 for name in FIXED) * ranks)
        budget = default_budget(memory, fixed, share=share, on_host=on_host, ranks=ranks)
        if on_host:
            return budget, "half of the free memory at most, less the above"
        return budget, f"{share:g} of the memory, less the above"

    def _longest(self, budget: int) -> Figure:
        limit = self._facts.max_positions
        length = longest_that_fits(self._sizes, budget, UNBOUNDED)
        if not self._room_for(1, length, budget):
            self._notes.append("does not fit: no memory is left for a KV cache")
            return Figure(0, TOKENS, "batch 1; the weights leave no room")
        if all(size.group.sliding_window for size in self._sizes) or length >= limit:
            return Figure(limit, TOKENS, "batch 1; the model's positions, memory holds more")
        return Figure(length, TOKENS, f"batch 1; of the model's {limit} positions")

    def _batch(self, budget: int) -> Figure:
        context = self._settings.context
        scratch = sum(size.block_bytes for size in self._sizes)
        batch = max(0, (budget - scratch) // sequence_bytes(self._sizes, context))
        return Figure(batch, "sequences", f"of {context} tokens each, by memory")

    def _room_for(self, batch: int, length: int, budget: int) -> bool:
        scratch = sum(size.block_bytes for size in self._sizes)
        return batch * sequence_bytes(self._sizes, length) + scratch <= budget

    # -- how fast ------------------------------------------------------------------------------

    def _limits(self, fits: Section) -> Section:
        line, settings = self._target.roofline, self._settings
        names = ("decode, batch 1", "decode, largest batch", f"prefill of {PREFILL_TOKENS}")
        if line is None:
            unknown = Figure(None, "tokens/s", "unknown: the platform names no roofline")
            return dict.fromkeys(names, unknown)
        flops = line.flops.get(dtype_name(settings.dtype))
        source = line.source
        if flops is None:
            self._notes.append(
                f"the rate of {dtype_name(settings.dtype)} products is not known: limits are those "
                "of the memory alone"
            )
        rate, load = flops or math.inf, self._load()
        context = settings.context
        one = load.decode_seconds(1, context, line, rate)
        batch = int(min(fits["largest batch"].value or 0, settings.lengths.num_seqs))
        many = load.decode_seconds(batch, context, line, rate) if batch else None
        prefill = load.prefill_seconds(PREFILL_TOKENS, line, rate)
        return {
            "memory bandwidth": Figure(line.bandwidth, "bytes/s", source),
            f"{dtype_name(settings.dtype)} products": Figure(flops, "flop/s", source),
            names[0]: Figure(1 / one, "tokens/s", f"context {context}; launches take nothing"),
            names[1]: Figure(
                batch / many if many else None,
                "tokens/s",
                f"{batch} sequences of {context}"
                + (", as many as max_num_seqs" if batch == settings.lengths.num_seqs else " fit"),
            ),
            names[2]: Figure(prefill, "seconds", f"{PREFILL_TOKENS} tokens, alone"),
        }

    def _load(self) -> Load:
        settings, memory, one = self._settings, self._memory, self._parameters
        if memory is not None:
            read, experts = float(memory.read_per_step), float(memory.experts)
        else:
            share = settings.dtype.itemsize / settings.ranks
            read, experts = (one.body + one.head) * share, one.experts * share
        return Load(
            facts=self._facts,
            parameters=one,
            read_bytes=read,
            expert_bytes=experts,
            cache=self._sizes,
            ranks=settings.ranks,
        )
