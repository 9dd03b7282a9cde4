"""A YAML text as plain values that remember where they were written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

from ..errors import PipelineError

if TYPE_CHECKING:
    from collections.abc import Sequence

KeyPath = tuple[str | int, ...]
Position = tuple[int, int, int]  # sorts problems: command line first, then line and column

_BASE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MERGE = "tag:yaml.org,2002:merge"


class PlainLoader(_BASE):  # type: ignore[misc]
    """The safe loader without dates: `2024-01-01` stays a string."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in _BASE.yaml_implicit_resolvers.items()
    }


def parse_value(text: str) -> Any:
    """One YAML value, as `--set` and the environment give it.

    Raises:
        yaml.YAMLError: the text is not YAML.
    """
    return yaml.load(text, Loader=PlainLoader)


@dataclass(slots=True)
class Mark:
    """Where a value and its key begin, 1-based. `text_column` is the column of a one-line string's first character."""

    line: int
    column: int
    key_line: int
    key_column: int
    text_column: int | None = None


@dataclass(slots=True)
class Document:
    """Plain values, the marks of where they stand, and which of them came from `--set`.

    Values that were never written in a file are located by their keys: `pipeline:operators.decode.max_batch`.
    """

    source: str
    data: Any
    is_file: bool = False
    marks: dict[KeyPath, Mark] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def locate(self, path: KeyPath, *, at_key: bool = False, offset: int = 0) -> tuple[Position, str]:
        """The sortable position of a value and its text: `file:line:col`, or the `--set` that gave it."""
        for length in range(len(path), -1, -1):
            prefix = path[:length]
            if prefix in self.origins:
                return (0, 0, 0), self.origins[prefix]
            mark = self.marks.get(prefix)
            if mark is None:
                continue
            exact = length == len(path)
            if (at_key and exact) or (not exact and length > 0):
                line, column = mark.key_line, mark.key_column
            elif exact and offset and mark.text_column is not None:
                line, column = mark.line, mark.text_column + offset
            else:
                line, column = mark.line, mark.column
            return (1, line, column), f"{self.source}:{line}:{column}"
        dotted = "1:1" if self.is_file else ".".join(map(str, path))
        return (1, 1, 1), f"{self.source}:{dotted}" if dotted else self.source

    def find_cause(self, paths: Sequence[KeyPath]) -> KeyPath:
        """Of values that contradict each other the one to point at: that of `--set`, else the first that is written."""
        given = (path for path in paths if any(path[: length + 1] in self.origins for length in range(len(path))))
        written = (path for path in paths if path in self.marks)
        return next(given, None) or next(written, paths[0])

    def override(self, path: KeyPath, value: Any, origin: str) -> None:
        """Put a value at a path, as `--set` asks; missing mappings on the way are created.

        Raises:
            LookupError: a step leads through a plain value or past the end of a list.
        """
        if not isinstance(self.data, dict):
            raise LookupError("the file holds no mapping")
        container: Any = self.data
        steps: list[str | int] = []
        for key in path[:-1]:
            steps.append(_step(container, key, steps))
            if isinstance(container, dict) and container.get(key) is None:
                container[key] = {}
            container = container[steps[-1]]
        steps.append(_step(container, path[-1], steps))
        container[steps[-1]] = value
        path = tuple(steps)
        for known in [p for p in self.marks if p[: len(path)] == path]:
            del self.marks[known]
        self.origins[path] = origin


def _step(container: Any, key: str | int, steps: list[str | int]) -> str | int:
    """The key or index that one step of a path means."""
    if isinstance(container, dict):
        return key
    where = ".".join(map(str, steps))
    if not isinstance(container, list):
        raise LookupError(f"{where} is not a mapping, so it has no {key!r}")
    if not str(key).isdigit() or int(key) >= len(container):
        raise LookupError(f"{where} is a list of {len(container)}: write an index from 0")
    return int(key)


def read_document(text: str, source: str) -> Document:
    """Parse YAML.

    Raises:
        PipelineError: the text is not YAML, gives a key twice, or uses a tag, key or alias that cannot be plain data.
    """
    loader = PlainLoader(text)
    try:
        root = loader.get_single_node()
        builder = _Builder(loader, source)
        document = Document(source, builder.build(root, (), None), True, builder.marks)
    except yaml.MarkedYAMLError as error:
        raise PipelineError([_syntax_problem(error, text, source)]) from error
    except yaml.YAMLError as error:
        raise PipelineError([f"{source}:1:1: not readable as YAML: {error}"]) from error
    finally:
        loader.dispose()
    if builder.problems:
        raise PipelineError(builder.problems)
    return document


def _syntax_problem(error: yaml.MarkedYAMLError, text: str, source: str) -> str:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    message = ", ".join(part for part in (error.problem, error.context) if part)
    lines = text.splitlines()
    shown = lines[line - 1] if line <= len(lines) else ""
    hint = ""
    if "${" in shown and ("{" in shown.replace("${", "") or "[" in shown):
        hint = '; inside {...} and [...] a reference needs quotes: "${name}"'
    elif message.endswith("while scanning an alias"):
        hint = '; a text that begins with * needs quotes: "*.error -> dead"'
    elif "\t" in shown[: len(shown) - len(shown.lstrip())]:
        hint = "; indent with spaces, not tabs"
    return f"{source}:{line}:{column}: not YAML: {message}{hint}"


class _Builder:
    """Turns yaml's node tree into plain values, noting a mark for each."""

    def __init__(self, loader: Any, source: str) -> None:
        self.loader = loader
        self.source = source
        self.marks: dict[KeyPath, Mark] = {}
        self.problems: list[str] = []
        self._open: set[int] = set()

    def build(self, node: Any, path: KeyPath, key_node: Any) -> Any:
        if node is None:
            return None
        self._mark(node, path, key_node)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if id(node) in self._open:
            self._problem(node, "an alias inside its own anchor: write the value out")
            return None
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.build(item, (*path, index), None) for index, item in enumerate(node.value)]
            return self._mapping(node, path)
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: Any, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        seen: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self._scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                self._problem(key_node, f"found {key!r} as a key; write a name, in quotes if YAML reads it otherwise")
                continue
            if key in seen:
                first = seen[key].start_mark
                self._problem(
                    key_node, f"key {key!r} is given twice, first at line {first.line + 1}: remove one or rename it"
                )
                continue
            seen[key] = key_node
            values[key] = self.build(value_node, (*path, key), key_node)
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                self._merge(value_node, values, path)
        return values

    def _merge(self, node: Any, values: dict[str, Any], path: KeyPath) -> None:
        """`<<: *anchor`: keys given explicitly win, then the first of a list of anchors."""
        for part in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(part, yaml.MappingNode) or id(part) in self._open:
                self._problem(node, "`<<` takes an alias of another mapping: write `<<: *name`")
                continue
            inner = _Builder(self.loader, self.source)
            inner._open = self._open
            merged = inner.build(part, path, None)
            self.problems += inner.problems
            for key, value in merged.items():
                if key not in values:
                    values[key] = value
                    own = (*path, key)
                    self.marks |= {p: mark for p, mark in inner.marks.items() if p[: len(own)] == own}

    def _scalar(self, node: Any) -> Any:
        try:
            return self.loader.construct_object(node)
        except (yaml.constructor.ConstructorError, ValueError) as error:
            message = getattr(error, "problem", None) or str(error)
            self._problem(node, f"{message}: a pipeline holds plain values only")
            return None

    def _mark(self, node: Any, path: KeyPath, key_node: Any) -> None:
        start, end = node.start_mark, node.end_mark
        key = (key_node or node).start_mark
        text_column = None
        if isinstance(node, yaml.ScalarNode) and start.line == end.line:
            quotes = 1 if node.style in ("'", '"') else 0
            if end.column - start.column == len(node.value) + 2 * quotes:
                text_column = start.column + 1 + quotes
        self.marks[path] = Mark(start.line + 1, start.column + 1, key.line + 1, key.column + 1, text_column)

    def _problem(self, node: Any, message: str) -> None:
        mark = node.start_mark
        self.problems.append(f"{self.source}:{mark.line + 1}:{mark.column + 1}: {message}")
