"""What the graph knows of an operator without running it: its ports, its configuration, what it promises."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..config import Config


class RecordKind(StrEnum):
    """The kinds of record an edge can carry; one for each class in records.py."""

    REQUEST = "request"
    SEQUENCE = "sequence"
    DELTA = "delta"
    COMPLETION = "completion"
    DEAD_LETTER = "dead_letter"
    KV_EVENT = "kv_event"


ANY_KIND = frozenset(RecordKind)


@dataclass(frozen=True, slots=True)
class Port:
    """A named end of an edge and the record kinds it takes or gives.

    An output port with `same_as` gives what arrives at that input port (filter, map, tee). An `optional` port may be
    left without an edge; every other port must have one (the error port: unless `on_error` is `drop` or `fail`).
    `setting` names the operator's field that is for this port, and so for nothing where no edge leaves it.
    """

    name: str
    kinds: frozenset[RecordKind] = ANY_KIND
    same_as: str | None = None
    optional: bool = False
    setting: str | None = None


ERROR_PORT = Port("error", frozenset({RecordKind.DEAD_LETTER}))


@dataclass(frozen=True, slots=True)
class OperatorSpec:
    """The declaration of one operator type.

    `requires` and `provides` name facts about a sequence ("leased", "prefilled"): on every path from a source, each
    required fact must have been provided upstream; this finds missing stages. No fact of `precedes` may be provided
    upstream on any path: this stage would come too late. A `single` operator stands once in a pipeline.
    What leaves a source must be able to reach its `answered_by`, an operator's type. `writes` and `reads` name the
    config fields whose values are files that this operator writes or reads, so that two writers of one file are found,
    and a writer of a file that is read.
    """

    name: str
    summary: str
    guarantee: str
    config_model: type[Config]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    requires: frozenset[str] = field(default_factory=frozenset)
    provides: frozenset[str] = field(default_factory=frozenset)
    precedes: frozenset[str] = field(default_factory=frozenset)
    single: bool = False
    answered_by: str | None = None
    writes: str | None = None
    reads: str | None = None
    example: str = ""
    factory: Any = None  # the Operator class

    def input(self, name: str) -> Port | None:
        """The input port of that name, or None."""
        return next((port for port in self.inputs if port.name == name), None)

    def output(self, name: str) -> Port | None:
        """The output port of that name, or None."""
        return next((port for port in self.outputs if port.name == name), None)

    def title(self, node: str) -> str:
        """A node of this type in a message: its name, and its type where that differs."""
        return f"{node!r}" if node == self.name else f"{node!r} ({self.name})"

    @property
    def is_source(self) -> bool:
        return not self.inputs

    @property
    def is_sink(self) -> bool:
        return all(port.name == "error" for port in self.outputs)
