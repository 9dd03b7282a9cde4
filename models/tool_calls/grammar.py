"""What an output must look like in which there are to be calls, or may be: grammars for guided decoding."""

from __future__ import annotations

import json
import re
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from .formats import ToolFormat

_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as templates write JSON
_ANY_OBJECT = {"type": "object"}
_BLANK = r"[ \t\n\r]*"  # between what JSON consists of


def forced_call_grammar(
    tool_format: ToolFormat,
    tools: list[dict[str, Any]],
    control_ids: Mapping[str, int],
    name: str | None = None,
    parallel: bool = True,
) -> str:
    """The Lark grammar, as llguidance reads it, of an output that is one call or, if `parallel`, several.

    They call any of `tools`, which have OpenAI's form, or the one that is called `name`, with arguments that conform to
    its JSON schema. `control_ids` are the tokenizer's (`Tokenizer.control_ids`).
    """
    functions = [tool["function"] for tool in tools]
    wanted = [function for function in functions if name is None or function["name"] == name]
    opening = _marker(tool_format.opening, control_ids)
    begin = f"{opening} " if tool_format.closing or tool_format.is_list else ""
    rules = [f"start: {begin}calls", *_rules_of_calls(tool_format, wanted, control_ids, parallel)]
    return "\n".join([*rules, *(_rule_of_arguments(index, function) for index, function in enumerate(wanted))])


def free_call_grammar(
    tool_format: ToolFormat, tools: list[dict[str, Any]], control_ids: Mapping[str, int], parallel: bool = True
) -> str:
    """The same of an output that is text of any kind, or text and then calls.

    A call begins with the format's opening, as a token of its own or spelled. From there on the output is calls:
    arguments of functions that are `strict` conform to the function's JSON schema, those of others are any object. In a
    format that is `bare`, a text that begins with `{` becomes a call as soon as its `name` is that of a function.

    Kept out of the text are the byte 0xff, what would be read as a call though it does not begin like that, and a
    control token within what may be the beginning of one.
    """
    functions = [tool["function"] for tool in tools]
    opening, own = json.dumps(tool_format.opening), control_ids.get(tool_format.opening)
    others = _ranges(token for token in control_ids.values() if token != own)
    starts = ["pieces TEXT?", "pieces opened calls", *(["blanks bare"] if tool_format.bare else [])]
    unfinished = " | ".join(json.dumps(tool_format.opening[:length]) for length in range(1, len(tool_format.opening)))
    rules = [
        '%llguidance {"allow_invalid_utf8": true}',  # of text: a token may be a part of a character
        f"start: {' | '.join(starts)}",
        f"pieces: {'(WHOLE? control)*' if others else ''}",
        *([f"control: <[{others}]>"] if others else []),
        f"opened: spelled {'' if own is None else f'| TEXT? <[{own}]>'}",
        f"spelled[lazy]: UNCALLED {opening}",
        r"ANY: /[\x00-\xFE]*/",
        f"UNCALLED: ANY {'& ~(BARE ANY NAMED ANY)' if tool_format.bare else ''}",
        f"TEXT: UNCALLED & ~(ANY {opening} ANY)",
        # What is around a control token is read as one text.
        f"WHOLE: TEXT & ~(ANY ({unfinished})) {'& ~(BARE ANY)' if tool_format.bare else ''}",
        *(_rules_of_bare_calls(functions) if tool_format.bare else []),
        *([f"blanks: {'(BLANK? control)*' if others else ''}"] if tool_format.bare else []),
        *_rules_of_calls(tool_format, functions, control_ids, parallel),
    ]
    return "\n".join([*rules, *_rules_of_strict_arguments(functions)])


def answer_or_call_grammar(
    tool_format: ToolFormat,
    tools: list[dict[str, Any]],
    control_ids: Mapping[str, int],
    answer: str,
    parallel: bool = True,
) -> str:
    """The same of an output that is calls, as `free_call_grammar` has them, or an answer: `answer` is its Lark rule.

    Not for a format that is `bare`, whose calls and JSON begin alike.
    """
    functions = [tool["function"] for tool in tools]
    opening = _marker(tool_format.opening, control_ids)
    rules = [f"start: answer | {opening} calls", f"answer: {answer}"]
    rules += _rules_of_calls(tool_format, functions, control_ids, parallel)
    return "\n".join([*rules, *_rules_of_strict_arguments(functions)])


def _rules_of_calls(
    tool_format: ToolFormat, functions: list[dict[str, Any]], control_ids: Mapping[str, int], parallel: bool
) -> list[str]:
    """`calls` is what follows an opening."""
    opening, closing = (_marker(marker, control_ids) for marker in (tool_format.opening, tool_format.closing))
    if tool_format.is_list:
        more = '(", " call)*' if parallel else ""
        calls = f'" "? "[" call {more} "]"'
    elif tool_format.closing:
        one = f'"\\n" call "\\n" {closing}'
        calls = f'{one} ("\\n" {opening} {one})*' if parallel else one
    else:  # a template that takes one call only
        calls = "call"
    rules = [f"calls: {calls}", "call: " + " | ".join(f"call_{index}" for index in range(len(functions)))]
    for index, function in enumerate(functions):
        head = f'{{"name": {json.dumps(function["name"])}'
        rules.append(f"call_{index}: {json.dumps(head)} rest_{index}")
        key = json.dumps(f', "{tool_format.arguments_key}": ')
        rules.append(f'rest_{index}: {key} arguments_{index} "}}"')
    return rules


def _rules_of_strict_arguments(functions: list[dict[str, Any]]) -> list[str]:
    return [
        _rule_of_arguments(index, function if function.get("strict") else {"parameters": _ANY_OBJECT})
        for index, function in enumerate(functions)
    ]


def _rule_of_arguments(index: int, function: dict[str, Any]) -> str:
    schema = {"x-guidance": _SPACING, **(function.get("parameters") or _NO_PARAMETERS)}
    return f"arguments_{index}: %json {json.dumps(schema)}"


def _rules_of_bare_calls(functions: list[dict[str, Any]]) -> list[str]:
    """`bare` is a call without an opening. BARE is how a text begins that may be one, NAMED the name that makes it one,
    however it is written in JSON."""
    names = [function["name"] for function in functions]
    heads = [f"head_{index} rest_{index}" for index in range(len(names))]
    named = f"{_spelling('name')}{_BLANK}:{_BLANK}({'|'.join(_spelling(name) for name in names)})"
    rules = [f"bare: {' | '.join(heads)}", f"BLANK: /{_BLANK}/", r"BARE: /[^!-~]*\{/", f"NAMED: /{named}/"]
    for index, name in enumerate(names):
        rules.append(f'head_{index}[lazy]: /{_BLANK}\\{{{_BLANK}"name"{_BLANK}:{_BLANK}"{re.escape(name)}"/')
    return rules


def _spelling(text: str) -> str:
    """A regular expression of a JSON string, any characters of which may be escaped."""
    characters = [f"({re.escape(char)}|\\\\u(?i:{ord(char):04x}))" for char in text]
    return f'"{"".join(characters)}"'


def _ranges(tokens: Iterable[int]) -> str:
    """Token ids as a list of ranges: `3-7,9-9`."""
    runs = groupby(enumerate(sorted(tokens)), key=lambda pair: pair[1] - pair[0])
    ends = [(run[0][1], run[-1][1]) for run in ([*pairs] for _, pairs in runs)]
    return ",".join(f"{first}-{last}" for first, last in ends)


def _marker(marker: str, control_ids: Mapping[str, int]) -> str:
    return f"<[{control_ids[marker]}]>" if marker in control_ids else json.dumps(marker)
