"""From what a user asks to what the engine takes: tokenised, checked, every default resolved."""

from __future__ import annotations

import dataclasses
import functools
import random
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import ContextLengthError, InvalidRequestError
from ..kv.hashing import prefix_root
from ..sampling_params import BeamSearchParams, SamplingParams
from ..text.tokenizer import Tokenizer
from ..types import Prompt
from .client import EngineInfo
from .messages import EngineRequest

PromptInput = str | Sequence[int] | Mapping[str, Any]

# A text this many times longer (in characters) than the context (in tokens) is almost surely too
# long, since a token has some four characters: it is looked at piece by piece. Not so one that is
# tokenised in an instant: the caller may want its tokens for something else, or cut them to fit.
LONG_TEXT_FACTOR = 8
SHORT_TEXT = 1 << 18  # characters
BOUNDARY_TOKENS = 16  # by so many the tokens of a prefix may exceed those of the whole at its end


class Intake:
    """Prepares requests for one engine. Safe to use from several threads.

    `clamp`: a `max_tokens` beyond the context is cut to fit (as offline users expect); otherwise
    it is a `ContextLengthError`.
    """

    def __init__(self, info: EngineInfo, tokenizer: Tokenizer | None, *, clamp: bool) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self._clamp = clamp
        self._model = info.model
        self._seeds = random.Random(info.model.seed)
        self._secret = secrets.token_bytes(32)
        eos = list(info.model.eos_token_ids)
        own = tokenizer.eos_token_id if tokenizer is not None else None
        if own is not None and own not in eos:
            eos.append(own)
        self._eos = eos
        # Bounded, because a salt is the client's to choose; the root of a chain costs two hashes.
        self._root = functools.lru_cache(maxsize=1024)(self._find_root)

    def default_sampling_params(self, **overrides: Any) -> SamplingParams:
        """The model's generation defaults, then `overrides`. A default of `max_tokens` below the
        `min_tokens` asked for does not hold: the rest of the context is allowed then."""
        fields = dict(self._model.generation)
        most, least = fields.get("max_tokens"), overrides.get("min_tokens")
        if isinstance(most, int) and isinstance(least, int) and most < least:
            fields["max_tokens"] = None
        return SamplingParams(**{**fields, **overrides})

    def prepare(
        self,
        prompt: PromptInput,
        params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str = "",
        key_id: bytes = b"",
        beam: BeamSearchParams | None = None,
    ) -> EngineRequest:
        """Raises `InvalidRequestError` (bad prompt, ids, log-probabilities) and
        `ContextLengthError`; the message says which field and what would be right."""
        self._check_params(params)
        tokens = self._tokenise(prompt)
        limit = self._model.max_model_len
        if len(tokens.token_ids) >= limit:
            raise too_long(len(tokens.token_ids), limit)
        request = EngineRequest(
            request_id=request_id,
            prompt=tokens,
            params=self._resolve(params, limit - len(tokens.token_ids)),
            eos_token_ids=self._eos,
            bad_words_ids=[ids for word in params.bad_words for ids in self._bad_word(word)],
            cache_root=self._root(cache_salt, key_id),
            priority=priority,
            beam=beam,
        )
        self._check_bans(request)
        return request

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids, perhaps more than the context holds; `ContextLengthError` early for a long
        text (more than `SHORT_TEXT` characters) that can never fit."""
        tokenizer = self._need_tokenizer("prompt")
        limit = self._model.max_model_len
        size = max(limit * LONG_TEXT_FACTOR, SHORT_TEXT)
        while size < len(text):
            count = len(tokenizer.encode(text[:size], add_special_tokens=False))
            if count > limit + BOUNDARY_TOKENS:
                raise ContextLengthError(
                    f"the prompt has more than {count - BOUNDARY_TOKENS} tokens, but the context "
                    f"holds {limit}. Shorten it.",
                    param="prompt",
                )
            size *= 4
        return tokenizer.encode(text, add_special_tokens)

    def _tokenise(self, prompt: PromptInput) -> Prompt:
        match prompt:
            case str():
                return self._of_text(prompt, True)
            case {"prompt_token_ids": ids, **others}:
                written = others.get("prompt")
                text = written if isinstance(written, str) else None
                return Prompt.of_tokens(self._checked_ids(ids), text)
            case {"prompt": str(text), **others}:
                return self._of_text(text, bool(others.get("add_special_tokens", True)))
            case Mapping() | bytes():
                pass
            case _ if isinstance(prompt, Sequence):
                return Prompt.of_tokens(self._checked_ids(prompt))
        raise InvalidRequestError(
            "a prompt is a string, a list of token ids, or an object with `prompt` or "
            f"`prompt_token_ids`; this one is {type(prompt).__name__}.",
            param="prompt",
        )

    def _of_text(self, text: str, add_special_tokens: bool) -> Prompt:
        token_ids = self.encode(text, add_special_tokens)
        if not token_ids:
            raise InvalidRequestError("the prompt is empty.", param="prompt")
        return Prompt.of_tokens(token_ids, text)

    def _checked_ids(self, ids: Any) -> list[int]:
        if not isinstance(ids, Sequence):
            if not isinstance(ids, Iterable):
                raise InvalidRequestError(
                    f"prompt_token_ids is {ids!r:.50}; a list of token ids is wanted.",
                    param="prompt_token_ids",
                )
            ids = list(ids)
        if not ids:
            raise InvalidRequestError("the prompt is empty.", param="prompt")
        if len(ids) >= self._model.max_model_len:
            raise too_long(len(ids), self._model.max_model_len)
        return self._valid_ids(ids, "prompt")

    def _valid_ids(self, ids: Any, field: str) -> list[int]:
        size = self._model.vocab_size
        for position, token in enumerate(ids):
            if type(token) is not int or not 0 <= token < size:
                raise InvalidRequestError(
                    f"{field}[{position}] is {token!r:.50}; token ids are whole numbers in "
                    f"[0, {size}).",
                    param=field,
                )
        return list(ids)

    def _check_params(self, params: SamplingParams) -> None:
        most = self._model.max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(params, name)
            if wanted is not None and most >= 0 and not 0 <= wanted <= most:
                raise InvalidRequestError(
                    f"{name} is {wanted}; at most {most} are allowed (--max-logprobs).", param=name
                )
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            self._valid_ids(getattr(params, name) or (), name)
        if params.stop:
            self._need_tokenizer("stop")

    def _check_bans(self, request: EngineRequest) -> None:
        """Something must be left for the first token."""
        allowed = request.params.allowed_token_ids
        banned = request.own_bans([])
        if all(token in banned for token in allowed or range(self._model.vocab_size)):
            names = ("allowed_token_ids", "bad_words", "min_tokens")
            raise InvalidRequestError(
                f"{', '.join(name for name in names if getattr(request.params, name))} together "
                "leave no token that may come first.",
                param="allowed_token_ids" if allowed else "bad_words",
            )

    def _resolve(self, params: SamplingParams, room: int) -> SamplingParams:
        """Concrete `max_tokens` and `seed`."""
        changes: dict[str, Any] = {}
        if params.max_tokens is None:
            changes["max_tokens"] = room
        elif params.max_tokens > room:
            if not self._clamp:
                limit = self._model.max_model_len
                raise ContextLengthError(
                    f"the prompt has {limit - room} tokens and max_tokens is {params.max_tokens}, "
                    f"but the context holds {limit}. Shorten the prompt, or ask for at most "
                    f"{room} tokens.",
                    param="max_tokens",
                )
            changes["max_tokens"] = room
        if "max_tokens" in changes and params.min_tokens > room:
            changes["min_tokens"] = room
        if params.seed is None:
            changes["seed"] = self._seeds.getrandbits(63)
        return dataclasses.replace(params, **changes) if changes else params

    def _bad_word(self, word: str) -> list[list[int]]:
        """The token sequences that spell a word: at the start of a text, and after a space."""
        tokenizer = self._need_tokenizer("bad_words")
        plain = tokenizer.encode(word.lstrip(), add_special_tokens=False)
        spaced = tokenizer.encode(" " + word.lstrip(), add_special_tokens=False)
        # Some tokenizers write the space as a token of its own: that spells the plain word.
        found = [plain] if spaced[-len(plain) :] == plain else [plain, spaced]
        return [ids for ids in found if ids]

    def _find_root(self, cache_salt: str, key_id: bytes) -> bytes:
        return prefix_root(
            model=str(self._model.path),
            kv_dtype=self.info.kv_dtype,
            numerics=self._model.quantization or "default",
            key_id=key_id,
            server_secret=self._secret,
            cache_salt=cache_salt,
        )

    def _need_tokenizer(self, field: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequestError(
                f"{field} needs a tokenizer, and this engine has none.", param=field
            )
        return self.tokenizer


def too_long(count: int, limit: int) -> ContextLengthError:
    return ContextLengthError(
        f"the prompt has {count} tokens, but the context holds {limit} (prompt and at least one "
        "generated token). Shorten it.",
        param="prompt",
    )
