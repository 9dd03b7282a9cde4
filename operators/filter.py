"""filter: keeps the records that meet conditions, or for which a function of the user's says yes."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..config.problems import Contradiction
from ..records import DeadLetter, TokenDelta
from ..runtime.flow.operator import ERROR_PORT, Operator, OperatorConfig, Outlet, Port, RecordKind, operator
from .conditions import Condition  # noqa: TC001 - pydantic reads the annotation
from .functions import FunctionName, explain_failure, find_function

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..graph.document import KeyPath


class FilterConfig(OperatorConfig):
    """Either `where`, conditions that must all hold, or `function`, a name given with `@register_function`."""

    where: list[Condition] = Field(default_factory=list)
    function: FunctionName | None = None

    def contradictions(self) -> Iterator[Contradiction]:
        if bool(self.where) == (self.function is not None):
            text = "write either `where: [{field: ..., op: ..., value: ...}]` or `function: <name>`"
            yield Contradiction(text, ("function", "where"))

    def explain_misfits(self, kinds: frozenset[RecordKind]) -> Iterator[tuple[KeyPath, str]]:
        judged = kinds - {RecordKind.DELTA}
        for index, condition in enumerate(self.where if judged else ()):
            misfit = condition.explain_misfit(judged)
            if misfit is not None:
                yield ("where", index, misfit[0]), misfit[1]


@operator("filter")
class Filter(Operator[FilterConfig]):
    """Passes on the records that meet its conditions; the others leave by `rest`, or end here if that has no edge.

    A request whose record ends here is done, and counted as filtered. A record for which a function raises, or that
    lacks a field, becomes a dead letter. TokenDeltas always pass: what is judged is the record at the end of a stream.

    Guarantee: each record leaves at most once, unchanged and in order; what ends here is counted.
    """

    config_model = FilterConfig
    inputs = (Port("in"),)
    outputs = (Port("out", same_as="in"), Port("rest", same_as="in", optional=True), ERROR_PORT)
    guarantee = "each record leaves at most once, unchanged and in order; what ends here is counted"
    example = """\
operators:
  short: {type: filter, where: [{field: usage.completion_tokens, op: "<", value: 100}]}
edges:
  - detokenize -> short -> sink
  - short.rest -> long_answers
"""

    async def open(self) -> None:
        name = self.config.function
        self._function = self._meets_all if name is None else find_function(name)

    async def process(self, records: list[Any], out: Outlet) -> None:
        kept: list[Any] = []
        rest: list[Any] = []
        letters: list[DeadLetter] = []
        for record in records:
            if isinstance(record, TokenDelta):
                kept.append(record)
                continue
            try:
                keep = self._function(record)
                if inspect.isawaitable(keep):
                    keep = await keep
            except Exception as error:
                letters.append(explain_failure(self.context.name, record, error))
            else:
                (kept if keep else rest).append(record)
        await out.send(kept)
        await out.send(rest, "rest")
        await out.reject(letters)

    def _meets_all(self, record: Any) -> bool:
        return all(condition.holds(record) for condition in self.config.where)
