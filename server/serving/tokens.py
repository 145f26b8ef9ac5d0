"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..json_body import INLINE_BYTES, INLINE_TOKENS, off_loop, parse
from ..protocol.chat import TokenizeChatRequest, TokenizeRequest
from ..protocol.completions import DetokenizeRequest
from ..responses import JSONResponse
from ..router import ServedModel
from ..state import ServerState
from . import chat_prompt, common


class Tokens:
    """The endpoints."""

    def __init__(self, state: ServerState) -> None:
        self.state = state

    async def tokenize(self, request: Request) -> Response:
        body = await request.body()
        fields, headers = await off_loop(len(body) > INLINE_BYTES, lambda: self._read(body))
        model = self.state.router.resolve(fields.model)
        if isinstance(fields, TokenizeChatRequest):
            ids = await chat_prompt.prompt_ids(model, fields)
        else:
            ids = await model.engine.encode(
                fields.prompt, add_special_tokens=fields.add_special_tokens
            )
        return await _tokens(model, ids, fields.return_token_strs, headers)

    def _read(self, body: bytes) -> tuple[TokenizeRequest | TokenizeChatRequest, dict[str, str]]:
        values = parse(body)
        if "messages" in values:
            return common.validated(values, TokenizeChatRequest, self.state)
        return common.validated(values, TokenizeRequest, self.state)

    async def detokenize(self, request: Request) -> Response:
        fields, headers = await common.read_request(request, DetokenizeRequest, self.state)
        model = self.state.router.resolve(fields.model)
        await common.check_token_ids(model, fields.tokens, "tokens")
        decode = model.engine.tokenizer.decode
        text = await off_loop(
            len(fields.tokens) > INLINE_TOKENS,
            lambda: decode(fields.tokens, skip_special_tokens=False),
        )
        return JSONResponse({"prompt": text}, 200, headers)


async def _tokens(
    model: ServedModel, ids: list[int], with_text: bool, headers: dict[str, str]
) -> Response:
    body: dict[str, Any] = {
        "count": len(ids),
        "max_model_len": model.max_model_len,
        "tokens": ids,
    }
    if with_text:
        token_text = model.engine.tokenizer.token_text
        body["token_strs"] = await off_loop(
            len(ids) > INLINE_TOKENS, lambda: [token_text(one) for one in ids]
        )
    return JSONResponse(body, 200, headers)
