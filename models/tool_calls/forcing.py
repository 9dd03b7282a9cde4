"""What an output must look like that is to be a call: a grammar for guided decoding."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .formats import ToolFormat

_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as templates write JSON


def forced_call_grammar(
    tool_format: ToolFormat,
    tools: list[dict[str, Any]],
    special_ids: Mapping[str, int],
    name: str | None = None,
    parallel: bool = True,
) -> str:
    """The Lark grammar, as llguidance reads it, of an output that is one call or, if `parallel`, several.

    They call any of `tools`, which have OpenAI's form, or the one that is called `name`, with arguments that conform to
    its JSON schema. `special_ids` are the ids of the format's markers that are special tokens of the tokenizer's.
    """
    functions = [tool["function"] for tool in tools]
    wanted = [function for function in functions if name is None or function["name"] == name]
    opening, closing = (_marker(marker, special_ids) for marker in (tool_format.opening, tool_format.closing))
    if tool_format.is_list:
        more = '(", " call)*' if parallel else ""
        start = f'{opening} " "? "[" call {more} "]"'
    elif tool_format.closing:
        one = f'{opening} "\\n" call "\\n" {closing}'
        start = f'{one} ("\\n" {one})*' if parallel else one
    else:  # a template that takes one call only
        start = "call"
    rules = [f"start: {start}", "call: " + " | ".join(f"call_{index}" for index in range(len(wanted)))]
    for index, function in enumerate(wanted):
        head = f'{{"name": {json.dumps(function["name"])}, "{tool_format.arguments_key}": '
        schema = json.dumps({"x-guidance": _SPACING, **(function.get("parameters") or _NO_PARAMETERS)})
        rules += [f'call_{index}: {json.dumps(head)} arguments_{index} "}}"', f"arguments_{index}: %json {schema}"]
    return "\n".join(rules)


def _marker(marker: str, special_ids: Mapping[str, int]) -> str:
    return f"<[{special_ids[marker]}]>" if marker in special_ids else json.dumps(marker)
