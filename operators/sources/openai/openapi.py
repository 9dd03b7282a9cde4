"""GET /openapi.json: the API described, from what its endpoints declare."""

from __future__ import annotations

from functools import cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter
from pydantic_core import to_json
from typing_extensions import TypedDict

from .endpoint import Endpoint

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pydantic.json_schema import JsonSchemaMode

    from .call import Call

_REFERENCE = "#/components/schemas/{model}"
_ALWAYS = (400, 500)
_OF_BODIES = (404, 408, 413, 415, 429, 503, 504)


class ErrorDetail(TypedDict):
    """`param` is the first field that is wrong; `code` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(TypedDict):
    error: ErrorDetail


class Description(TypedDict):
    openapi: str
    info: dict[str, Any]
    paths: dict[str, Any]
    components: dict[str, Any]


async def answer(call: Call) -> None:
    await call.answer(200, _document(call.service.keys.is_required))


@cache
def _document(has_keys: bool) -> bytes:
    from .endpoints import ENDPOINTS

    return to_json(describe(ENDPOINTS, has_keys))


def describe(endpoints: Iterable[Endpoint], has_keys: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document of these endpoints; `has_keys`: calls need a bearer key."""
    schemas: dict[str, Any] = {}
    error = {"application/json": {"schema": _schema_of(Error, schemas, "serialization")}}
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        statuses = {*_ALWAYS, *endpoint.statuses, *(_OF_BODIES if endpoint.body else ())}
        needs_key = has_keys and endpoint.needs_key
        content = {"application/json": {"schema": _schema_of(endpoint.result, schemas, "serialization")}}
        if endpoint.streams:
            content["text/event-stream"] = {"schema": {"type": "string"}}
        operation: dict[str, Any] = {
            "summary": endpoint.summary,
            "responses": {
                "200": {"description": "The answer", "content": content},
                **{
                    str(status): {"description": HTTPStatus(status).phrase, "content": error}
                    for status in sorted(statuses | ({401} if needs_key else set()))
                },
            },
        }
        if endpoint.body is not None:
            form = {"schema": _schema_of(endpoint.body, schemas, "validation")}
            operation["requestBody"] = {"required": True, "content": {"application/json": form}}
        if name := endpoint.path.partition("{")[2].rstrip("}"):
            place = {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            operation["parameters"] = [place]
        if needs_key:
            operation["security"] = [{"bearer": []}]
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = operation
    components: dict[str, Any] = {"schemas": schemas}
    if has_keys:
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    info = {"title": "sageLLM", "version": "1", "description": "OpenAI's API, answered by a sageLLM pipeline."}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}


def _schema_of(form: Any, schemas: dict[str, Any], mode: JsonSchemaMode) -> dict[str, Any]:
    """A reference to the form's schema, which comes to `schemas` with all that it refers to."""
    schema = TypeAdapter(form).json_schema(ref_template=_REFERENCE, mode=mode)
    for name, found in [*schema.pop("$defs", {}).items(), (form.__name__, schema)]:
        assert schemas.setdefault(name, found) == found, f"there are two forms of the name {name}"
    return {"$ref": _REFERENCE.format(model=form.__name__)}


ENDPOINT = Endpoint("GET", "/openapi.json", "This description", answer, Description, needs_key=False)
