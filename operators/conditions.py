"""Conditions on the fields of a record, as `filter` takes them."""

from __future__ import annotations

import operator
import re
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator

from ..config import Config
from ..config.problems import Contradiction
from ..config.wording import did_you_mean, show
from ..errors import RequestError
from ..graph.checks import words
from .record_fields import RECORD_TYPES, NoSuchFieldError, find_type, groups_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..graph.operator_spec import RecordKind

_TESTS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "in": lambda found, value: found in value,
    "not in": lambda found, value: found not in value,
    "contains": lambda found, value: value in found,
    "matches": lambda found, value: re.search(value, found) is not None,
}
_ORDERED = ("<", "<=", ">", ">=")


class Condition(Config):
    """`{field: metrics.e2e_ms, op: "<", value: 500}`: a record's field, a comparison, and what to compare with.

    `field` is a path of names and list positions, such as `request.tenant` or `choices.0.finish_reason`. `contains`
    asks for a part of the field's text or list, `matches` for a regular expression in its text.
    """

    field: str
    op: Literal["==", "!=", "<", "<=", ">", ">=", "in", "not in", "contains", "matches"] = "=="
    value: Any

    @field_validator("field")
    @classmethod
    def _is_a_path(cls, path: str) -> str:
        for name in path.split("."):
            if not (name.isdecimal() or name.isidentifier()) or name.startswith("_"):
                raise ValueError("no path to a field; write names with dots between, such as request.tenant")
        return path

    def contradictions(self) -> Iterator[Contradiction]:
        if self.op == "matches":
            try:
                re.compile(self.value)
            except (TypeError, re.error) as error:
                yield Contradiction(f"value {self.value!r} is no regular expression: {error}", ("value", "op"))
        elif self.op in ("in", "not in") and not isinstance(self.value, list):
            yield Contradiction(f"value {self.value!r} is no list; write `value: [a, b]`", ("value", "op"))

    def explain_misfit(self, kinds: frozenset[RecordKind]) -> tuple[str, str] | None:
        """The key that no record of these kinds can meet, and why; None where some can."""
        types: list[Any] = []
        instead: list[str] = []
        for kind in kinds:
            try:
                types.append(find_type(RECORD_TYPES[kind], self.field))
            except NoSuchFieldError as error:
                instead += error.instead
        if not types:
            return "field", f"{words(kinds)} has no field {self.field!r}{did_you_mean(self.field, set(instead))}"
        found = set[str]().union(*map(groups_of, types))
        wanted = groups_of(type(self.value)) if self.op in _ORDERED else {"text"} if self.op == "matches" else found
        if found & {"any", *wanted}:
            return None
        return "value", f"found {show(self.value)} for {self.op!r}, but {self.field} is a {' or '.join(sorted(found))}"

    def holds(self, record: Any) -> bool:
        """Whether the record meets it.

        Raises:
            RequestError: the record has no such field, or it cannot be compared with the value.
        """
        found = self._find(record)
        try:
            return bool(_TESTS[self.op](found, self.value))
        except TypeError as error:
            raise RequestError(f"{self.field} is {found!r}, which is not to be compared with {self.value!r}") from error

    def _find(self, record: Any) -> Any:
        found = record
        for name in self.field.split("."):
            try:
                if isinstance(found, dict):
                    found = found[name]
                elif isinstance(found, (list, tuple)) and name.isdecimal():
                    found = found[int(name)]
                else:
                    found = getattr(found, name)
            except (AttributeError, LookupError, ValueError):
                raise RequestError(f"a {type(record).__name__} has no field {self.field!r}") from None
        return found
