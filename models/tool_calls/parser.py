"""Reads calls from the text that a model writes, as it comes."""

from __future__ import annotations

import json
import re
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic_core import from_json

from ...records import ToolCall

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .formats import ToolFormat

_JSON_STRUCTURE = re.compile(r'["\\{}\[\]]')


class Parsed(NamedTuple):
    """What a piece of text has added."""

    content: str
    calls: list[ToolCall]


class ToolCallParser:
    """Takes a text in pieces. However it is cut, the contents of what `push` and `finish` return, joined, are the same,
    and so are the calls.

    A call comes out whole, once it is certain that it is one: JSON of the format's form that names one of the tools.
    What only looks like a call is content, unchanged; it is held back until that shows. Whitespace before a call
    is dropped, and what follows the last one.
    """

    def __init__(self, tool_format: ToolFormat, names: Iterable[str], max_calls: int | None = None) -> None:
        """Calls of the functions `names` are wanted; those after the first `max_calls` are dropped."""
        self._format = tool_format
        self._names = frozenset(names)
        self._max_calls = max_calls
        self.calls: list[ToolCall] = []  # so far
        self._contents: list[str] = []
        self._buffer = ""  # what is undecided
        self._block: _Block | None = None  # at the buffer's beginning
        self._may_begin = tool_format.bare  # a call without an opening
        self._space = ""  # at the end of the content so far
        self._after_call = False  # nothing but space has come since

    def push(self, text: str) -> Parsed:
        """Take the next piece."""
        self._buffer += text
        return self._note(*self._read(is_final=False))

    def finish(self) -> Parsed:
        """The text has ended."""
        content, calls = self._read(is_final=True)
        if not self._after_call:
            content += self._space
        self._space = ""
        return self._note(content, calls)

    @property
    def content(self) -> str:
        """All of it so far."""
        return "".join(self._contents)

    def _note(self, content: str, calls: list[ToolCall]) -> Parsed:
        if self._max_calls is not None:
            calls = calls[: max(0, self._max_calls - len(self.calls))]
        self._contents.append(content)
        self.calls += calls
        return Parsed(content, calls)

    def _read(self, *, is_final: bool) -> tuple[str, list[ToolCall]]:
        content: list[str] = []
        calls: list[ToolCall] = []
        while self._buffer:
            if self._block is None:
                start = self._find_block(is_final)
                if start:
                    content.append(self._pass_on(start))
                if not self._buffer or not self._at_block():
                    break
                self._block = _Block(self._format, self._names, self._opening())
            end = self._block.read(self._buffer, is_final)
            if end is None:
                break
            if self._block.calls:
                calls += [ToolCall(self._new_id(), *call) for call in self._block.calls]
                self._buffer = self._buffer[end:]
                self._space, self._after_call, self._may_begin = "", True, self._format.bare
            else:
                content.append(self._pass_on(end))
            self._block = None
        return "".join(content), calls

    def _opening(self) -> str:
        return self._format.opening if self._buffer.startswith(self._format.opening) else ""

    def _at_block(self) -> bool:
        return bool(self._opening()) or (self._may_begin and self._buffer.startswith("{"))

    def _find_block(self, is_final: bool) -> int:
        """How much of the buffer is certainly no part of a call."""
        opening, text = self._format.opening, self._buffer
        if self._may_begin and text.lstrip().startswith("{"):
            return len(text) - len(text.lstrip())
        at = text.find(opening)
        if at >= 0:
            return at
        return len(text) if is_final else len(text) - _overlap(text, opening)

    def _pass_on(self, count: int) -> str:
        """The buffer's first characters are content; space at their end waits for what follows."""
        text, self._buffer = self._buffer[:count], self._buffer[count:]
        solid = text.rstrip()
        if not solid:
            self._space += text
            return ""
        passed, self._space = self._space + solid, text[len(solid) :]
        self._after_call = self._may_begin = False
        return passed

    def _new_id(self) -> str:
        if self._format.id_length:
            return uuid.uuid4().hex[: self._format.id_length]
        return f"call_{uuid.uuid4().hex[:24]}"


class _Block:
    """What begins like a call: at the beginning of a text, with its opening if it has one."""

    def __init__(self, tool_format: ToolFormat, names: frozenset[str], opening: str) -> None:
        self.calls: list[tuple[str, str]] = []  # names and arguments, once it is certain
        self._format = tool_format
        self._names = names
        self._opening = opening
        self._json: _JSONEnd | None = None
        self._json_end: int | None = None
        self._found: list[tuple[str, str]] = []

    def read(self, text: str, is_final: bool) -> int | None:
        """Where it ends; None while that is open. Without `calls` it is none, and so much of it is content."""
        no_call = len(self._opening) or 1
        if self._json_end is None:
            start = _skip_space(text, len(self._opening))
            if start == len(text):
                return no_call if is_final else None
            if text[start] != ("[" if self._format.is_list else "{"):
                return no_call
            if self._json is None:
                self._json = _JSONEnd(start)
            self._json_end = self._json.find(text)
            if self._json_end is None:
                return no_call if is_final else None
            self._found = self._read_calls(text[start : self._json_end])
            if not self._found:
                return no_call
        end = self._find_end(text, self._json_end, is_final)
        if end is None and not is_final:
            return None
        if end == 0:
            return no_call
        self.calls = self._found
        return len(text) if end is None else end

    def _find_end(self, text: str, start: int, is_final: bool) -> int | None:
        """Where what must follow the JSON ends: 0 if something else follows, None while it may still come."""
        if self._format.is_list:
            return start
        start = _skip_space(text, start)
        rest = text[start:]
        if not rest:
            return None
        if self._format.closing:
            if rest.startswith(self._format.closing):
                return start + len(self._format.closing)
            return None if self._format.closing.startswith(rest) else 0
        if rest[0] == ";":
            return start + 1
        if rest[0] == "{" or rest.startswith(self._format.opening):
            return start
        return None if self._format.opening.startswith(rest) and not is_final else 0

    def _read_calls(self, text: str) -> list[tuple[str, str]]:
        try:
            value = from_json(text, allow_inf_nan=False)
            objects = value if self._format.is_list else [value]
            calls = [self._read_call(each) for each in objects]
        except ValueError:
            return []
        return [call for call in calls if call is not None] if None not in calls else []

    def _read_call(self, value: Any) -> tuple[str, str] | None:
        if not isinstance(value, dict):
            return None
        name = value.get("name")
        if not isinstance(name, str) or name not in self._names:
            return None
        given = [value[key] for key in ("arguments", "parameters") if key in value]
        if len(given) != 1 or not isinstance(given[0], dict):
            return None
        return name, json.dumps(given[0], ensure_ascii=False, allow_nan=False)


class _JSONEnd:
    """Finds the end of a JSON object or list in a text that grows."""

    def __init__(self, start: int) -> None:
        self._at = start
        self._depth = 0
        self._in_string = False

    def find(self, text: str) -> int | None:
        """Where what begins at `start` ends, if the text holds that."""
        while found := _JSON_STRUCTURE.search(text, self._at):
            char, self._at = found[0], found.end()
            if char == "\\":
                if self._at == len(text):  # what it escapes is yet to come
                    self._at = found.start()
                    return None
                self._at += 1
            elif char == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += 1 if char in "{[" else -1
                if self._depth == 0:
                    return self._at
        self._at = len(text)
        return None


def _skip_space(text: str, start: int) -> int:
    return len(text) - len(text[start:].lstrip())


def _overlap(text: str, marker: str) -> int:
    """The length of the longest end of `text` that begins `marker`, without being all of it."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-length:]):
            return length
    return 0
