"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..json_body import parse_off_loop
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
        body = await parse_off_loop(await request.body())
        if "messages" in body:
            return await self._chat(body)
        fields, headers = common.validated(body, TokenizeRequest, self.state)
        model = self.state.router.resolve(fields.model)
        ids = await model.engine.encode(fields.prompt, add_special_tokens=fields.add_special_tokens)
        return _tokens(model, ids, fields.return_token_strs, headers)

    async def _chat(self, body: dict[str, Any]) -> Response:
        fields, headers = common.validated(body, TokenizeChatRequest, self.state)
        model = self.state.router.resolve(fields.model)
        ids = await chat_prompt.prompt_ids(model, fields)
        return _tokens(model, ids, fields.return_token_strs, headers)

    async def detokenize(self, request: Request) -> Response:
        fields, headers = await common.read_request(request, DetokenizeRequest, self.state)
        model = self.state.router.resolve(fields.model)
        common.check_token_ids(model, fields.tokens, "tokens")
        text = model.engine.tokenizer.decode(fields.tokens, skip_special_tokens=False)
        return JSONResponse({"prompt": text}, 200, headers)


def _tokens(
    model: ServedModel, ids: list[int], with_text: bool, headers: dict[str, str]
) -> Response:
    body: dict[str, Any] = {
        "count": len(ids),
        "max_model_len": model.max_model_len,
        "tokens": ids,
    }
    if with_text:
        body["token_strs"] = [model.engine.tokenizer.token_text(one) for one in ids]
    return JSONResponse(body, 200, headers)
