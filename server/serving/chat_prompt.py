"""From chat messages to the prompt's token ids."""

from __future__ import annotations

from ...core.errors import InvalidRequestError
from ..protocol.chat import TEMPLATE_VARIABLES, TemplateFields
from ..router import ServedModel


async def render(model: ServedModel, fields: TemplateFields) -> str:
    """The prompt's text. Raises `InvalidRequestError` for what the template cannot render."""
    _check(model, fields)
    tools = [tool.model_dump(exclude_none=True) for tool in fields.tools]
    return await model.engine.render_chat(
        [message.model_dump(exclude_none=True) for message in fields.messages],
        tools=tools if tools and fields.tool_choice != "none" else None,
        documents=fields.documents,
        add_generation_prompt=fields.add_generation_prompt and not fields.continue_final_message,
        continue_final_message=fields.continue_final_message,
        variables=fields.chat_template_kwargs,
    )


async def prompt_ids(model: ServedModel, fields: TemplateFields) -> list[int]:
    text = await render(model, fields)
    return await model.engine.encode(text, add_special_tokens=fields.add_special_tokens)


def _check(model: ServedModel, fields: TemplateFields) -> None:
    if fields.chat_template is not None:
        raise InvalidRequestError(
            "chat_template: a request may not bring its own template.", param="chat_template"
        )
    unknown = sorted(set(fields.chat_template_kwargs) - TEMPLATE_VARIABLES)
    if unknown:
        raise InvalidRequestError(
            f"chat_template_kwargs: `{unknown[0][:64]}` may not be set by a request; "
            f"these may: {', '.join(sorted(TEMPLATE_VARIABLES))}.",
            param="chat_template_kwargs",
        )
    generation_prompt = "add_generation_prompt" in fields.model_fields_set
    if fields.continue_final_message and generation_prompt and fields.add_generation_prompt:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt exclude each other.",
            param="continue_final_message",
        )
    if fields.tool_choice == "required" or not isinstance(fields.tool_choice, str | None):
        raise InvalidRequestError(
            "tool_choice: only none and auto are supported yet.", param="tool_choice"
        )
    if model.engine.chat_template is None:
        raise InvalidRequestError(
            "This model has no chat template: use /v1/completions, or start the server with "
            "--chat-template.",
            param="messages",
        )
