"""What is wrong with JSON that should have the form of a TypedDict, in words for who wrote it."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from pydantic_core import from_json
from typing_extensions import is_typeddict

from ...errors import RequestError

if TYPE_CHECKING:
    from pydantic import ValidationError


def explain(error: ValidationError, given: bytes | dict[str, Any], form: type[Any]) -> RequestError:
    """Each field of `given` that is wrong, what was found there and what to write instead."""
    details = error.errors(include_url=False)
    if isinstance(given, bytes) and details[0]["type"] == "json_invalid":
        return RequestError(_explain_syntax(details[0]["ctx"]["error"], given))
    data = from_json(given) if isinstance(given, bytes) else given
    problems: dict[str, list[str]] = {}
    for detail in details:
        kind, loc = detail["type"], [*detail["loc"]]
        if kind == "dict_type" and not loc:
            found = _json_type(detail["input"])
            return RequestError(f'found a JSON {found}: write an object such as {{"prompt": "..."}}')
        path = _path_of(loc, data, is_missing=kind == "missing")
        field = ".".join(path)
        said = problems.setdefault(field, [])
        message = detail["msg"].removeprefix("Input should be ")
        if kind == "extra_forbidden":
            said.append(_explain_unknown(path, _form_at(loc, form)))
        elif kind == "missing":
            said.append(f"missing field '{field}'")
        elif said:
            said.append(f" or {message}")
        else:
            should = "should be " if message != detail["msg"] else "but "
            message = message.removeprefix("Value error, ")
            said.append(f"{field}: found {_short(detail['input'])}, {should}{message[0].lower()}{message[1:]}")
    return RequestError("; ".join("".join(said) for said in problems.values()), next(iter(problems)) or None)


def _explain_syntax(reason: str, line: bytes) -> str:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}"
    return f"not JSON: {reason.replace('at line 1 column', 'at column')}"


def _explain_unknown(path: list[str], form: Any) -> str:
    fields = sorted(get_type_hints(form))
    near = get_close_matches(path[-1], fields, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(fields)}"
    return f"unknown field '{'.'.join(path)}': {hint}"


def _path_of(loc: list[Any], data: Any, is_missing: bool) -> list[str]:
    """The place in the data. pydantic's has the branches of unions that it tried, too."""
    path = []
    for depth, part in enumerate(loc):
        if part in data if isinstance(data, dict) else isinstance(data, list) and isinstance(part, int):
            data = data[part]
        elif not (is_missing and depth == len(loc) - 1):
            continue
        path.append(str(part))
    return path


def _form_at(loc: list[Any], form: Any) -> Any:
    """The form that has not got the last field of a place."""
    forms = [form]
    for part in loc[:-1]:
        branch = [each for each in forms if each.__name__ == part]
        inner = [
            found
            for each in forms
            if part in each.__annotations__
            for found in _forms_in(get_type_hints(each, include_extras=True)[part])
        ]
        forms = branch or inner or forms
    return forms[0]


def _forms_in(kind: Any) -> list[Any]:
    if is_typeddict(kind):
        return [kind]
    return [found for inner in get_args(kind) for found in _forms_in(inner)]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _json_type(value: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
