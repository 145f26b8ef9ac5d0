"""What a user may say: `EngineArgs` and `ServerArgs`. No torch here, so that `--help` is instant.

CLI flags derive from the fields: the `help` in a field's metadata is the flag's help.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from .errors import ConfigError

DEFAULT_MODEL = "default"
# Fields that are text because of their suffixes ("32k", "4g"); a plain number is fine too.
SIZE_FIELDS = ("max_model_len", "kv_cache_memory_bytes")
# Formats that weights are quantized to at load.
QUANTIZATIONS = ("int8", "int4", "w4a16", "fp8")
# Numbers of an engine that mean nothing below one.
AT_LEAST_ONE = (
    "num_threads",
    "num_gpu_blocks_override",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_num_queued_reqs",
    "max_num_queued_tokens",
    "tensor_parallel_size",
    "step_timeout",
)
# Limits of the server that would refuse everything.
ABOVE_ZERO = (
    "max_body_bytes",
    "max_header_bytes",
    "receive_timeout",
    "max_connections",
    "max_stream_buffer",
)


_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


def parse_size(text: str | int, param: str) -> int:
    """`16384`, `16k` (16,000), `16K` (16,384), `1.5m`, `2G` → a positive integer."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgKMG]?)(?:i?[bB])?\s*", str(text))
    value = int(float(match[1]) * _SUFFIXES[match[2]]) if match else 0
    if match and "." not in match[1]:
        value = int(match[1]) * _SUFFIXES[match[2]]
    if value <= 0:
        raise ConfigError(
            f"{param} is {text!r}: a positive number is wanted, with k, m, g (1000s) or K, M, G "
            "(1024s) behind it if you like.",
            param=param,
        )
    return value


def option(default: Any, help: str, *, choices: tuple[str, ...] | None = None) -> Any:
    """A field that is also a command-line flag."""
    metadata = {"help": help, "choices": choices}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class EngineArgs:
    """What a user may say about an engine; None means "decide for me"."""

    model: str = option(DEFAULT_MODEL, "Directory, hub id in the local cache, or `default`.")
    tokenizer: str | None = option(None, "Tokenizer directory or hub id (the model's own).")
    revision: str | None = option(None, "Hub revision of the model.")
    trust_remote_code: bool = option(False, "Refused: code that comes with a model is never run.")
    dtype: str = option(
        "auto",
        "Weights and activations.",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    max_model_len: str | None = option(
        None, "Longest sequence in tokens (8k is 8000, 8K is 8192; `auto` fits memory)."
    )
    load_format: str = option("auto", "`safetensors`, or `dummy` for random weights.")
    quantization: str | None = option(
        None,
        "Quantize the weights of linear layers at load: `int8` by output, `int4` by groups of up "
        "to 128 inputs (the head in int8), and activations rounded to int8 where the platform "
        "gains by it; `w4a16` as int4, with activations and head as they are; `fp8` by output, "
        "with activations in FP8 where the platform multiplies those (the head in int8). Left out: "
        "all stays as it is.",
        choices=QUANTIZATIONS,
    )
    packed_cache: str = option(
        "auto",
        "Directory where packed weights are kept for the next start, `auto` (the user's cache "
        "directory, for checkpoints from 256 MiB on), or `off`.",
    )
    served_model_name: list[str] = option([], "Names the server answers to (repeatable).")
    generation_config: str = option(
        "auto", "`auto` (the model's), a directory, or `none` for the neutral defaults."
    )
    override_generation_config: dict[str, Any] = option({}, "JSON merged over it.")
    hf_overrides: dict[str, Any] = option({}, "JSON merged over the model's config.json.")
    enforce_eager: bool = option(
        False, "Launch every step op by op: none is compiled, none recorded and replayed."
    )
    seed: int = option(0, "Seed of everything not seeded by a request.")
    max_logprobs: int = option(20, "Most log-probabilities a request may ask for (-1: all).")
    logprobs_mode: str = option(
        "raw",
        "Log-probabilities before or after sampling processing.",
        choices=("raw", "processed"),
    )
    platform: str = option("auto", "Platform to run on (see `trimaran platforms`).")
    device: int = option(0, "Index of the device on that platform.")
    num_threads: int | None = option(None, "Compute threads (physical cores).")
    gpu_memory_utilization: float = option(
        0.92, "Share of device memory the engine may use (on hosts: of what is free, at most half)."
    )
    kv_cache_memory_bytes: str | None = option(
        None, "KV cache size in bytes (k, m, g: 1000s; K, M, G: 1024s)."
    )
    kv_cache_dtype: str = option(
        "auto",
        "KV cache element type. Where the platform keeps such a cache: `int8` (a scale for each "
        "vector), `fp8` or `fp8_e4m3`, `fp8_e5m2` (no scale).",
        choices=("auto", "bfloat16", "float16", "float32", "int8", "fp8", "fp8_e4m3", "fp8_e5m2"),
    )
    attention_backend: str = option(
        "auto", "Attention implementation to use, of those that `trimaran platforms` names."
    )
    block_size: int | None = option(None, "Tokens a KV block (the platform's choice).")
    num_gpu_blocks_override: int | None = option(None, "Exact number of KV blocks.")
    enable_prefix_caching: bool = option(True, "Reuse KV blocks of equal prefixes.")
    max_num_seqs: int | None = option(None, "Most sequences running at once.")
    max_num_batched_tokens: int | None = option(None, "Most tokens computed in a step.")
    enable_chunked_prefill: bool = option(True, "Let a prompt be computed over several steps.")
    long_prefill_token_threshold: int = option(
        0, "Most prompt tokens of one request a step (0: any)."
    )
    scheduling_policy: str = option(
        "fcfs", "Order of the queue.", choices=("fcfs", "priority", "sjf")
    )
    async_scheduling: str = option(
        "auto", "Plan step N+1 while N runs.", choices=("auto", "on", "off")
    )
    max_num_queued_reqs: int = option(4096, "Most requests waiting; more are refused with 429.")
    max_num_queued_tokens: int = option(8_388_608, "Most prompt tokens waiting.")
    tensor_parallel_size: int = option(1, "Processes one model's layers are split over.")
    low_latency_collectives: bool = option(
        False,
        "Sum small messages of ranks by kernels that wait for each other on the device, where the "
        "platform has them: the end of a rank is then noticed by --step-timeout alone.",
    )
    step_timeout: float = option(
        600.0,
        "Seconds a step may take; then the engine, or a rank that does not finish it, counts as "
        "stuck and is ended; an idle engine after 60 at most. An engine inside its caller's "
        "process is not watched, its ranks are.",
    )

    def __post_init__(self) -> None:
        if self.trust_remote_code:
            raise ConfigError(
                "trust_remote_code: code that comes with a model is never run here. Leave it out: "
                "the architectures that are served need none.",
                param="trust_remote_code",
            )
        for name in SIZE_FIELDS:
            if isinstance(getattr(self, name), int):
                object.__setattr__(self, name, str(getattr(self, name)))
        if self.quantization not in (None, *QUANTIZATIONS):
            raise ConfigError(
                f"quantization is {self.quantization!r}; it must be one of "
                f"{', '.join(QUANTIZATIONS)}, or be left out.",
                param="quantization",
            )
        self._check_numbers()

    def _check_numbers(self) -> None:
        """What is wrong whatever the model: said here, before anything is started."""
        for name in AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1.", param=name)
        share = self.gpu_memory_utilization
        if not 0 < share <= 1:
            raise ConfigError(
                f"gpu_memory_utilization is {share}; it must be in (0, 1].",
                param="gpu_memory_utilization",
            )
        for name in SIZE_FIELDS:
            size = getattr(self, name)
            if size is not None and (name, size) != ("max_model_len", "auto"):
                parse_size(size, name)


@dataclass(frozen=True, kw_only=True)
class ServerArgs:
    """What a user may say about the HTTP server."""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8000, "Port to listen on (0: any free one, printed).")
    uds: str | None = option(None, "Unix socket to listen on instead of a port.")
    api_key: list[str] = option([], "Accepted API key (repeatable; also TRIMARAN_API_KEY).")
    api_key_file: str | None = option(None, "File with one accepted API key a line.")
    chat_template: str | None = option(None, "File with a chat template (the model's own).")
    response_role: str = option("assistant", "Role of generated messages.")
    allowed_origins: list[str] = option([], "CORS origins (none).")
    allowed_hosts: list[str] = option([], "Host header names accepted beside the bound address.")
    root_path: str = option("", "Path prefix when behind a proxy.")
    strict_params: bool = option(False, "400 for unknown request fields instead of a header.")
    max_body_bytes: int = option(33_554_432, "Largest request body.")
    max_header_bytes: int = option(65_536, "Largest request header block.")
    receive_timeout: float = option(
        20.0, "Seconds for a request's headers, and for its body (and one more for each 16 KiB)."
    )
    max_connections: int = option(16_384, "Most connections; one more gets 503.")
    shutdown_timeout: float = option(30.0, "Seconds to drain after SIGTERM.")
    engine_restarts: int = option(
        3, "Times a dead engine is started again in ten minutes (0: exit instead)."
    )
    in_process_engine: bool = option(False, "Run the engine inside the server process.")
    enable_prompt_tokens_details: bool = option(True, "Report cached tokens in usage.")
    log_format: str = option("text", "Log lines.", choices=("text", "json"))
    log_level: str = option("info", "Log level.", choices=("debug", "info", "warning", "error"))
    disable_log_stats: bool = option(False, "No periodic statistics in the log.")
    max_stream_buffer: int = option(4_194_304, "Bytes a slow reader may lag before it is cut off.")

    def __post_init__(self) -> None:
        for name in ABOVE_ZERO:
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; it must be above 0.", param=name
                )


def flag_fields(args_class: type) -> list[dataclasses.Field[Any]]:
    """The dataclass fields that are command-line flags, in order."""
    return [f for f in dataclasses.fields(args_class) if "help" in f.metadata]
