"""Which implementations a model would be bound to: it is built, without memory for its tensors."""

from __future__ import annotations

from typing import Any

from ..core.args import EngineArgs
from ..core.dtypes import choose_dtype, choose_kv_dtype
from ..core.model_files import read_hf_config, resolve_model_path
from ..core.models.decoder import Decoder
from ..core.models.registry import decoder_spec
from ..core.models.step import StepBuffers, StepGroup
from ..core.ops import Binding, OpBinder
from ..core.planning.memory import ShapesOnly
from ..core.runner.runner import bind_ends
from ..core.sizing import measure_groups
from ..platforms.communicator import LocalCommunicator
from ..platforms.interface import Platform


def bindings_of(platform: Platform, args: EngineArgs) -> list[Binding]:
    """What `args.model` binds in `args.dtype` and `args.kv_cache_dtype`. Raises `TrimaranError`."""
    hf_config = read_hf_config(resolve_model_path(args.model, args.revision), args.hf_overrides)
    spec = decoder_spec(hf_config)
    known, name = platform.capabilities(), platform.name
    dtype = choose_dtype(args.dtype, hf_config, known, name)
    kv_dtype = choose_kv_dtype(args.kv_cache_dtype, dtype, known, name)
    device: Any = ShapesOnly()
    backend = args.attention_backend
    binder = OpBinder(platform, device, quantization=args.quantization, attention_backend=backend)
    groups = []
    sizes = measure_groups(
        platform,
        spec,
        dtype=dtype,
        kv_dtype=kv_dtype,
        block_size=args.block_size,
        ranks=1,
        attention_backend=backend,
    )
    for size in sizes:
        attention = spec.attention_spec(
            size.group, dtype=dtype, kv_dtype=kv_dtype, block_size=size.block_size
        )
        groups.append(StepGroup(size.group.layers, attention, binder.attention(attention)))
    buffers = StepBuffers(device, groups, max_tokens=1, max_positions=1)
    Decoder(spec, binder, buffers, LocalCommunicator(), dtype=dtype)
    bind_ends(binder, spec, dtype)
    return binder.report()
