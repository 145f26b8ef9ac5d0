"""A model's facts from config.json and safetensors headers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..args import EngineArgs
from ..errors import ConfigError, ModelLoadError, TrimaranError
from ..model_files import read_hf_config, resolve_model_path
from ..models.checkpoint import Checkpoint
from ..models.registry import decoder_spec
from ..models.spec import DecoderSpec
from .foreign import foreign_shapes

CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """`layers` of one kind. `pair_flops`: of one query with one key, scores and values, over all
    heads (2 a product and sum). `kv_elements`: what one token leaves in one layer's cache."""

    layers: int
    pair_flops: int
    kv_elements: int
    window: int | None = None

    def prefill_flops(self, tokens: int) -> float:
        """Causal attention of a prompt over itself in all the layers."""
        seen = min(tokens, self.window or tokens)
        pairs = tokens * seen - seen * seen / 2
        return self.layers * pairs * self.pair_flops


@dataclass(frozen=True, slots=True)
class Parameters:
    """Counts of elements, tied tables once. `body`: without embedding and head. Of `experts`, all
    of them routed ones in the body, a token uses the share `routed`."""

    total: int
    embedding: int
    head: int
    tied: bool
    experts: int = 0
    routed: float = 1.0

    @property
    def body(self) -> int:
        return self.total - self.embedding - (0 if self.tied else self.head)

    @property
    def active_body(self) -> int:
        return int(self.body - self.experts * (1 - self.routed))

    def touched(self, tokens: int) -> float:
        """The share of the experts that `tokens` tokens need, if each one's choice is random."""
        return 1 - (1 - self.routed) ** tokens


@dataclass(frozen=True, slots=True)
class Stored:
    """What the checkpoint's headers say."""

    elements: int
    size: int
    dtypes: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """`spec` None: an architecture that this engine cannot run (`obstacle` says why); then
    `shapes` are those of `transformers`' own modules."""

    name: str
    config: dict[str, Any]
    architecture: str
    spec: DecoderSpec | None
    obstacle: str
    shapes: Mapping[str, tuple[int, ...]]
    attention: tuple[AttentionShape, ...]
    max_positions: int
    stored: Stored | None
    remarks: tuple[str, ...] = ()

    def parameters(self, shapes: Mapping[str, tuple[int, ...]]) -> Parameters:
        """Counts of `shapes`: the decoder's own, or `self.shapes`."""
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        embedding = _of_part(sizes, "embed_tokens")
        head = _of_part(sizes, "lm_head")
        tied = bool(self.config.get("tie_word_embeddings", False)) or not head
        experts = sum(size for name, size in sizes.items() if ".experts." in name)
        total = sum(sizes.values())
        return Parameters(
            total=total,
            embedding=embedding,
            head=embedding if tied else head,
            tied=tied,
            experts=experts,
            routed=_routed_share(self.config) if experts else 1.0,
        )


def _of_part(sizes: Mapping[str, int], part: str) -> int:
    return sum(size for name, size in sizes.items() if part in name.split("."))


def _routed_share(config: Mapping[str, Any]) -> float:
    keys = ("num_experts", "num_local_experts", "n_routed_experts")
    count = next((config[key] for key in keys if config.get(key)), None)
    used = config.get("num_experts_per_tok")
    return used / count if used and count else 1.0


def read_model(args: EngineArgs) -> ModelFacts:
    """Facts of `args.model`: `default`, a directory, a config.json, or a hub id in the cache.
    Raises ModelLoadError or ConfigError. Reads no weights and fetches nothing."""
    path = find_model(args.model, args.revision)
    overrides = dict(args.hf_overrides)
    config = read_hf_config(path, {**overrides, "auto_map": None})
    remarks = []
    stored = None
    if path.is_dir():
        try:
            stored = read_headers(path)
        except TrimaranError as error:
            remarks.append(f"weights are planned from {CONFIG} alone: {error.message}")
    else:
        remarks.append(f"weights are planned from {path.name} alone: there are no headers with it")
    architecture = str(config["architectures"][0])
    try:
        spec: DecoderSpec | None = decoder_spec(config)
        obstacle = ""
    except ConfigError as error:
        if error.param != "architectures":
            raise
        spec, obstacle = None, error.message
    shapes = {} if spec else foreign_shapes(config)
    return ModelFacts(
        name=args.model,
        config=config,
        architecture=architecture,
        spec=spec,
        obstacle=obstacle,
        shapes=shapes,
        attention=_attention_of(spec) if spec else (_foreign_attention(config),),
        max_positions=spec.max_positions if spec else int(config["max_position_embeddings"]),
        stored=stored,
        remarks=tuple(remarks),
    )


def find_model(name: str, revision: str | None = None) -> Path:
    """The directory, or the lone configuration file, that `name` stands for."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or path.is_dir():
        return resolve_model_path(name, revision)
    import huggingface_hub  # lazy: a second of start-up that a local directory does not need

    found = huggingface_hub.try_to_load_from_cache(name, CONFIG, revision=revision)
    if not isinstance(found, str):
        raise ModelLoadError(
            f"{name!r} is neither a directory nor a file, and the local hub cache has no {CONFIG} "
            f"of it. Give its {CONFIG}, or fetch that file first; nothing is downloaded to plan."
        )
    return Path(found).parent


def read_headers(directory: Path) -> Stored:
    """Names, shapes and element types of the checkpoint, from its headers."""
    with Checkpoint(directory) as checkpoint:
        shapes = {name: checkpoint.shape(name) for name in checkpoint}
        dtypes = {name: checkpoint.dtype(name) for name in checkpoint}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    return Stored(
        elements=sum(sizes.values()),
        size=sum(sizes[name] * _bits(dtypes[name]) // 8 for name in sizes),
        dtypes=tuple(sorted(set(dtypes.values()))),
        shapes=shapes,
    )


def _bits(dtype: str) -> int:
    """Of safetensors' name of an element type: BF16, F32, I8, F8_E4M3, BOOL…"""
    digits = dtype.split("_")[0].lstrip("BFIUC")
    return int(digits) if digits.isdigit() else 8


def _attention_of(spec: DecoderSpec) -> tuple[AttentionShape, ...]:
    return tuple(
        AttentionShape(
            layers=len(group.layers),
            pair_flops=4 * spec.num_heads * spec.head_dim,
            kv_elements=2 * spec.num_kv_heads * spec.head_dim,
            window=group.sliding_window,
        )
        for group in spec.cache_groups()
    )


def _foreign_attention(config: Mapping[str, Any]) -> AttentionShape:
    """Latent attention keeps one compressed vector a token and layer beside the shared rope part
    (DeepSeek-V2, arXiv:2405.04434, section 2.1); all others keep keys and values."""
    layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
    if rank := config.get("kv_lora_rank"):
        query = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
        pair = 2 * heads * (query + config["v_head_dim"])
        return AttentionShape(layers, pair, rank + config["qk_rope_head_dim"])
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    return AttentionShape(layers, 4 * heads * head_dim, 2 * kv_heads * head_dim, window)
