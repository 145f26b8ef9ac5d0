"""Fields that completions and chat share: how to choose tokens, and what else the engine takes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from ...core.sampling_params import MAX_BAD_WORDS, MAX_BIAS_ENTRIES, MAX_N, MAX_SEED, MAX_STOP
from ...core.sampling_params import MAX_STOP_CHARS as STOP_CHARS
from .base import MAX_TOKEN_ID, MAX_TOKENS, Label, Name, Part, RequestModel, TokenId

MAX_LOGPROBS = 1_000_000  # above any vocabulary; the engine's own limit is --max-logprobs
MAX_TIMEOUT_MS = 86_400_000
MAX_PRIORITY = 2**31 - 1
MAX_BEAMS = 64

StopString = Annotated[str, Field(min_length=1, max_length=STOP_CHARS)]
BiasKey = Annotated[str, Field(pattern=r"^\d{1,10}$", max_length=10)]
BiasValue = Annotated[float, Field(ge=-100.0, le=100.0)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class StreamOptions(Part):
    include_usage: bool = False
    continuous_usage_stats: bool = False


# What belongs to features of later versions. The values in brackets ask for nothing.
LATER_SAMPLING: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "response_format": ({"type": "text"},),
    "repetition_detection": (),
    "thinking_token_budget": (),
    "dry_multiplier": (0, 0.0),
    "dry_base": (),
    "dry_allowed_length": (),
    "dry_sequence_breakers": (),
    "xtc_probability": (0, 0.0),
    "xtc_threshold": (),
    "kv_transfer_params": (),
    "mm_processor_kwargs": (),
    "deterministic": (False,),
    "logits_processors": (),
    "prompt_embeds": (),
}


class SamplingFields(RequestModel):
    """Defaults of None are decided by the model's generation_config."""

    model: Name | None = None
    n: int = Field(1, ge=1, le=MAX_N)
    temperature: float | None = Field(None, ge=0.0, le=100.0)
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    top_k: int | None = Field(None, ge=-1, le=MAX_TOKENS)
    min_p: float | None = Field(None, ge=0.0, le=1.0)
    presence_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    repetition_penalty: float | None = Field(None, ge=1e-3, le=100.0)
    logit_bias: dict[BiasKey, BiasValue] = Field({}, max_length=MAX_BIAS_ENTRIES)
    seed: int | None = Field(None, ge=-MAX_SEED - 1, le=MAX_SEED)
    stop: Annotated[list[StopString], BeforeValidator(_as_list)] = Field([], max_length=MAX_STOP)
    stop_token_ids: list[TokenId] = Field([], max_length=MAX_STOP)
    bad_words: list[StopString] = Field([], max_length=MAX_BAD_WORDS)
    allowed_token_ids: list[TokenId] | None = Field(None, min_length=1, max_length=MAX_LOGPROBS)
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0, le=MAX_TOKENS)
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    prompt_logprobs: int | None = Field(None, ge=-1, le=MAX_LOGPROBS)
    truncate_prompt_tokens: int | None = Field(None, ge=1, le=MAX_TOKEN_ID)
    use_beam_search: bool = False
    length_penalty: float | None = Field(None, ge=-10.0, le=10.0)

    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Label | None = None
    priority: int = Field(0, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    request_id: str | None = Field(None, pattern=r"^[A-Za-z0-9._:-]+$", max_length=128)
    cache_salt: str = Field("", max_length=256)
    return_token_ids: bool = False
    timeout_ms: int | None = Field(None, ge=1, le=MAX_TIMEOUT_MS)
