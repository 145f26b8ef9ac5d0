"""The base of all request models: strict types, bounds, and nothing dropped in silence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...core.errors import InvalidRequestError
from ..errors import from_validation

# A prompt may be as long as a body; whether it fits the context is for the tokenizer to say.
MAX_TEXT = 33_554_432
MAX_TOKENS = 2**31 - 1
MAX_TOKEN_ID = 2**31 - 1
MAX_PROMPT_TOKENS = 4_000_000
MAX_PROMPTS = 2_048
MAX_UNKNOWN = 64
# Of the unknown fields inside lists and parts, this many are named.
MAX_NAMED = 20

Name = Annotated[str, Field(max_length=256)]
Label = Annotated[str, Field(max_length=1_024)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
# Long lists are left at their first fault: describing millions would take half a minute, with
# the interpreter lock held.
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_PROMPT_TOKENS, fail_fast=True)]
# Free-form JSON (tool schemas, template variables): its depth and size were bounded as it was
# parsed, its own keys are bounded here.
JsonObject = Annotated[dict[Annotated[str, Field(max_length=256)], Any], Field(max_length=256)]

# Names of union branches (see `tag` below), which no error message should show.
TAGS = frozenset({"<text>", "<tokens>", "<texts>", "<token lists>", "<parts>", "<word>", "<named>"})


class Part(BaseModel):
    """A model inside a request. Unknown fields are kept, to be reported.

    `EXTRAS_USED`: they are passed on rather than ignored, so there is nothing to report.
    """

    EXTRAS_USED: ClassVar[bool] = False

    model_config = ConfigDict(
        extra="allow",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        hide_input_in_errors=True,
    )


class RequestModel(Part):
    """A request body.

    `LATER`: fields that other servers know and this one does not serve yet, each with the values
    that ask for nothing; any other value is refused rather than ignored.
    """

    LATER: ClassVar[Mapping[str, tuple[Any, ...]]] = {}


M = TypeVar("M", bound=RequestModel)


def parse_request(model: type[M], body: Mapping[str, Any]) -> tuple[M, list[str]]:
    """The validated request, and the names of the fields that mean nothing to it.

    A null is the same as leaving the field out. Raises `InvalidRequestError`.
    """
    given = {name: value for name, value in body.items() if value is not None}
    for name, neutral in model.LATER.items():
        if name in given and given.pop(name) not in neutral:
            raise InvalidRequestError(f"{name} is not supported yet.", param=name)
    try:
        request = model.model_validate(given)
    except ValidationError as error:
        raise from_validation(error, TAGS) from None
    unknown = list(request.model_extra or {})
    if len(unknown) > MAX_UNKNOWN:
        raise InvalidRequestError(f"The request has {len(unknown)} unknown fields.")
    return request, unknown + list(islice(_unknown_inside(request), MAX_NAMED))


def _unknown_inside(part: BaseModel, prefix: str = "") -> Iterator[str]:
    """Names like `messages[0].foo` of fields that no model declares, in the parts of `part`."""
    for name in type(part).model_fields:
        value = getattr(part, name)
        if isinstance(value, Part):
            yield from _unknown_of(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Part):
            for index, item in enumerate(value):
                yield from _unknown_of(item, f"{prefix}{name}[{index}].")


def _unknown_of(part: Part, prefix: str) -> Iterator[str]:
    if not part.EXTRAS_USED:
        yield from (prefix + name for name in part.model_extra or {})
    yield from _unknown_inside(part, prefix)
