"""Names, values and fields in the words of messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

YAML_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "list", dict: "mapping"}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that is most like a wrong one, or None."""
    from difflib import get_close_matches

    by_lower = {valid_name.lower(): valid_name for valid_name in sorted(valid)}
    near = get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[near[0]] if near else None


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`; did you mean 'x'?` with the nearest valid name, else the list of valid names."""
    names = sorted(valid)
    near = nearest(name, names)
    if near is not None:
        return f"; did you mean {near!r}?"
    if not names:
        return ""
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"; write one of: {shown}"


def show(value: Any) -> str:
    """A found value in the words of YAML, cut to a readable length."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, dict)):
        return f"a {YAML_TYPES[type(value)]}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


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
