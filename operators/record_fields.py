"""The fields that records declare, by path: what a condition may name, and of which type it is."""

from __future__ import annotations

from functools import cache
from types import NoneType, SimpleNamespace, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from ..graph.operator_spec import RecordKind
from ..records import Completion, DeadLetter, KVEvent, Request, Sequence, TokenDelta

if TYPE_CHECKING:
    from collections.abc import Iterator

RECORD_TYPES: dict[RecordKind, type] = {
    RecordKind.REQUEST: Request,
    RecordKind.SEQUENCE: Sequence,
    RecordKind.DELTA: TokenDelta,
    RecordKind.COMPLETION: Completion,
    RecordKind.DEAD_LETTER: DeadLetter,
    RecordKind.KV_EVENT: KVEvent,
}
# records.py imports numpy for type checkers only
_ARRAYS = {"NDArray": list, "np": SimpleNamespace(int32=int, float32=float)}


class NoSuchFieldError(LookupError):
    """A path leads nowhere; `instead` are the paths that begin alike and lead one step further."""

    def __init__(self, instead: list[str]) -> None:
        super().__init__(instead)
        self.instead = instead


def find_type(record: type, path: str) -> Any:
    """The declared type of what a path of names and list positions leads to.

    Raises:
        NoSuchFieldError: no record of the type can have such a field.
    """
    found: Any = record
    names = path.split(".")
    for index, name in enumerate(names):
        steps = dict(step for part in _alternatives(found) for step in _steps(part, name))
        if name not in steps:
            raise NoSuchFieldError([".".join([*names[:index], step]) for step in steps])
        found = steps[name]
    return found


def groups_of(hint: Any) -> set[str]:
    """Which comparisons fit a type: `number`, `text` or `list`, `record` for none, `any` where it is not declared."""
    return {_group(part) for part in _alternatives(hint)}


def _group(hint: Any) -> str:
    if hint is Any:
        return "any"
    kind = get_origin(hint) or hint
    if kind in (list, tuple):
        return "list"
    return "number" if issubclass(kind, (int, float)) else "text" if issubclass(kind, str) else "record"


def _alternatives(hint: Any) -> list[Any]:
    union = get_origin(hint) in (Union, UnionType)
    return [part for part in (get_args(hint) if union else (hint,)) if part is not NoneType]


def _steps(hint: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Where one step of a path may lead; `name` is only looked at where any name, or any position, will do."""
    kind = get_origin(hint) or hint
    if hint is Any or kind is dict:
        yield name, (*get_args(hint), Any, Any)[1]
    elif kind in (list, tuple):
        yield name if name.isdecimal() else "0", (*get_args(hint), Any)[0]
    else:
        yield from _fields(kind).items()


@cache
def _fields(kind: type) -> dict[str, Any]:
    fields = get_type_hints(kind, localns=_ARRAYS)
    for name, value in vars(kind).items():
        if isinstance(value, property):
            fields[name] = get_type_hints(value.fget, localns=_ARRAYS)["return"]
    return fields
