"""The fields of a request that say what its output must conform to. At most one of them may be given.

    {"response_format": {"type": "json_object"}}
    {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": {"type": "object", ...}}}}
    {"guided_regex": "(yes|no)"}
    {"guided_grammar": "start: \\"yes\\" | \\"no\\""}
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Required

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from ...errors import RequestError
from ...records import Guide, GuideKind

_STRICT = ConfigDict(extra="forbid", strict=True)

Source = Annotated[str, Field(min_length=1)]


@with_config(_STRICT)
class JSONSchema(TypedDict, total=False):
    """As OpenAI has it. `strict` may be either: an output always conforms."""

    name: str | None
    description: str | None
    schema: Required[dict[str, Any]]
    strict: bool | None


@with_config(_STRICT)
class ResponseFormat(TypedDict, total=False):
    type: Required[Literal["text", "json_object", "json_schema"]]
    json_schema: JSONSchema | None


class GuideFields(TypedDict, total=False):
    response_format: ResponseFormat | None
    guided_regex: Source | None
    guided_grammar: Source | None


def guide_from_fields(
    response_format: ResponseFormat | None, guided_regex: str | None, guided_grammar: str | None
) -> Guide | None:
    """The guide that checked fields ask for; None where they ask for text.

    Raises:
        RequestError: more than one of them asks for something, or a schema is missing or too many.
    """
    guides = {"response_format": _from_format(response_format)}
    guides["guided_regex"] = None if guided_regex is None else Guide(GuideKind.REGEX, guided_regex)
    guides["guided_grammar"] = None if guided_grammar is None else Guide(GuideKind.GRAMMAR, guided_grammar)
    given = {name: guide for name, guide in guides.items() if guide is not None}
    if len(given) > 1:
        names = [*given]
        raise RequestError(f"found {' and '.join(names)}: an output conforms to one of them, write one", names[0])
    return next(iter(given.values()), None)


def _from_format(given: ResponseFormat | None) -> Guide | None:
    if given is None:
        return None
    kind, schema = given["type"], given.get("json_schema")
    if (kind == "json_schema") != (schema is not None):
        found = "no json_schema" if schema is None else "a json_schema too"
        wanted = '{"name": ..., "schema": {...}}' if schema is None else "type json_schema, or leave it out"
        raise RequestError(f"response_format of type {kind}: found {found}, write {wanted}", "response_format")
    if schema is not None:
        return Guide(GuideKind.JSON_SCHEMA, json.dumps(schema["schema"], separators=(",", ":")))
    return Guide(GuideKind.JSON_OBJECT) if kind == "json_object" else None
