"""Collects what is wrong with a pipeline, so that one run reports everything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import PipelineError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .document import Document, KeyPath


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

    def add_any(self, paths: Sequence[KeyPath], message: str, *, at_key: bool = False) -> None:
        """Note a problem of several values together: where `--set` gave one of them, else at the first one written."""
        self.add(self.document.find_cause(paths), message, at_key=at_key)

    def ignore(self, path: KeyPath) -> None:
        """From now on nothing is said of this value: why it is wrong has been noted already."""
        self._unknown.add(path)

    def __len__(self) -> int:
        return len(self._found)

    def error(self) -> PipelineError:
        """The error that carries everything found, in the order of the file."""
        return PipelineError([text for _, text in sorted(self._found)])
