"""Configuration fields in words: what one takes, and what is wrong with a value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError

from ..errors import NotAvailableError
from .problems import did_you_mean, show

if TYPE_CHECKING:
    from .document import KeyPath
    from .problems import Problems

_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def describe_type(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """The words for a field's JSON Schema: `integer > 0`, `block | token | layer`, `list of strings`."""
    if "$ref" in schema:
        return describe_type(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions)
    for union in ("anyOf", "oneOf", "allOf"):
        if union in schema:
            return " | ".join(dict.fromkeys(describe_type(part, definitions) for part in schema[union]))
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    kind = schema.get("type", "any value")
    if kind == "array":
        return f"list of {describe_type(schema.get('items', {}), definitions)}"
    if kind == "object":
        keys = ", ".join(schema.get("properties", {}))
        return f"mapping of {keys}" if keys else "mapping"
    if kind == "string" and schema.get("format") in ("path", "file-path", "directory-path"):
        return "path"
    return " ".join([kind, *(f"{sign} {schema[bound]}" for bound, sign in _BOUNDS.items() if bound in schema)])


def validate_model(
    model: type[BaseModel], values: Any, path: KeyPath, what: str, problems: Problems, context: Any = None
) -> Any:
    """The validated model, or None after noting every problem of its values; `path` is where they stand."""
    try:
        return model.model_validate(values, context=context)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            _explain(model, detail, path, what, problems)
    except NotAvailableError as error:
        option = str(error).split()[0].split(".")
        problems.add((*path, *option[-1:]), str(error), at_key=True)
    return None


def _explain(model: type[BaseModel], detail: Any, path: KeyPath, what: str, problems: Problems) -> None:
    location = tuple(part for part in detail["loc"] if part != "[key]")
    where: KeyPath = (*path, *location)
    owner = model_at(model, location[:-1])
    name = ".".join(map(str, location))
    kind = detail["type"]
    if kind == "extra_forbidden":
        known = owner.model_fields if owner else ()
        problems.add(where, f"{what} has no field {name!r}{did_you_mean(str(location[-1]), known)}", at_key=True)
        return
    wanted = _wanted(owner, str(location[-1])) if owner and location else ""
    if kind == "missing":
        problems.add(where, f"{what} lacks the field {name!r}; write `{location[-1]}: <{wanted or 'value'}>`")
        return
    if not location:
        found = detail["msg"].removeprefix("Value error, ")
        problems.add(where, f"{what}: {found}")
        return
    message = detail["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    explained = kind == "value_error"  # by a validator of ours
    write = f"; write `{location[-1]}: <{wanted}>`" if wanted and not explained else ""
    found = "" if explained and isinstance(detail["input"], dict) else f"found {show(detail['input'])}, "
    problems.add(where, f"{what}, field {name!r}: {found}{message}{write}")


def model_at(model: type[BaseModel], location: tuple[Any, ...]) -> type[BaseModel] | None:
    """The nested model at a field path, or None where the path leads to something else."""
    current: type[BaseModel] | None = model
    for step in location:
        if current is None or step not in current.model_fields:
            return None
        annotation = current.model_fields[step].annotation
        options = [annotation, *get_args(annotation)]
        current = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
    return current


def _wanted(owner: type[BaseModel], name: str) -> str:
    if name not in owner.model_fields:
        return ""
    schema = owner.model_json_schema()
    return describe_type(schema["properties"][name], schema.get("$defs", {}))
