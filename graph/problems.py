"""Collects what is wrong with a pipeline, so that one run reports everything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import PipelineError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .document import Document, KeyPath

YAML_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "list", dict: "mapping"}


class Problems:
    """The problems found so far in one document, kept in the order of their positions."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self._found: set[tuple[tuple[int, int, int], str]] = set()
        self._unknown: set[KeyPath] = set()

    def add(self, path: KeyPath, message: str, *, at_key: bool = False, offset: int = 0) -> None:
        """Note a problem at a value (or its key); `offset` is a character inside a one-line string."""
        if path in self._unknown:
            return
        position, where = self.document.locate(path, at_key=at_key, offset=offset)
        self._found.add((position, f"{where}: {message}"))

    def ignore(self, path: KeyPath) -> None:
        """From now on nothing is said of this value: why it is wrong has been noted already."""
        self._unknown.add(path)

    def __len__(self) -> int:
        return len(self._found)

    def error(self) -> PipelineError:
        """The error that carries everything found, in the order of the file."""
        return PipelineError([text for _, text in sorted(self._found)])


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
