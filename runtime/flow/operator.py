"""The base of every operator: its declaration (class attributes) and its life (open, run, close).

An operator in ten lines:

    @operator("shout")
    class Shout(Operator[OperatorConfig]):
        \"\"\"Makes every answer loud.\"\"\"

        guarantee = "one record out for each record in, in order"
        inputs = (Port("in", frozenset({RecordKind.DELTA, RecordKind.COMPLETION})),)
        outputs = (Port("out", same_as="in"),)

        async def process(self, records, out):
            for record in records:
                if isinstance(record, Completion):
                    record.choices[0].text = record.choices[0].text.upper()
            await out.send(records)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, Protocol, TypeVar

from pydantic import Field

from ...config import Config
from ...graph.operator_spec import ERROR_PORT, OperatorSpec, Port, RecordKind
from ...graph.registry import register
from .resume import ResumeIndex

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from ...records import DeadLetter, Record
    from ..services import EngineServices
    from .ledger import Ledger

__all__ = ["ERROR_PORT", "Operator", "OperatorConfig", "OperatorContext", "Outlet", "Port", "RecordKind", "operator"]


class RestartPolicy(Config):
    """How often a failed operator is opened again: `max_restarts` within `window_s` seconds, then the flow fails."""

    max_restarts: Annotated[int, Field(ge=0)] = 3
    window_s: Annotated[float, Field(gt=0)] = 60.0
    backoff_s: Annotated[float, Field(ge=0)] = 0.1


class OperatorConfig(Config):
    """Fields that every operator has. `buffer` bounds its input queue, in records.

    `on_error` says what happens to a record that this operator cannot process: `route` sends a dead letter to the
    error port, `drop` counts and forgets it, `fail` stops the run.
    """

    buffer: Annotated[int, Field(gt=0)] = 1024
    on_error: Literal["route", "drop", "fail"] = "route"
    restart: RestartPolicy = Field(default_factory=RestartPolicy)


class Outlet(Protocol):
    """Where an operator puts its results."""

    async def send(self, records: Sequence[Record], port: str = "out") -> None:
        """Send records to every edge of a port; waits while a queue downstream is full."""
        ...

    async def reject(self, letters: Sequence[DeadLetter]) -> None:
        """Hand over records that failed; what becomes of them is `on_error`'s choice.

        Raises:
            FlowError: `on_error` is `fail`.
        """
        ...

    def drop(self, records: Sequence[Record]) -> None:
        """Let records end here on purpose; every record must be sent, rejected or dropped."""
        ...

    async def end(self) -> None:
        """Nothing more will be sent: what is downstream may end, while `run` goes on."""
        ...


@dataclass(slots=True, frozen=True)
class OperatorContext:
    """What an operator may reach beside its records."""

    name: str  # the node's name in the pipeline
    engine: EngineServices  # tokenizer, KV cache, scheduler, worker
    ledger: Ledger  # who is in flight
    base_dir: Path  # relative paths in the configuration start here
    request_drain: Callable[[str], None]  # ask the whole flow to drain, with the reason
    resume: ResumeIndex = field(default_factory=ResumeIndex)  # shared by the flow: what earlier runs finished
    wired: frozenset[str] = frozenset()  # its outputs that an edge leaves
    kept: dict[str, Any] = field(default_factory=dict)  # what an instance leaves to the one that replaces it


ConfigT = TypeVar("ConfigT", bound=OperatorConfig)


class Operator(Generic[ConfigT]):
    """One stage. Subclasses override `process`, or `run` when they need more than one record list at a time.

    The runtime calls `open`, then `run` once, then `close`, all in one task; every operator of the flow is open before
    any runs, sinks before sources (runtime/flow/resume.py rests on it). A raised exception is an operator failure
    (restart policy); a bad record is not: pass it to `out.reject`.
    """

    config_model: ClassVar[type[OperatorConfig]] = OperatorConfig
    inputs: ClassVar[tuple[Port, ...]] = ()
    outputs: ClassVar[tuple[Port, ...]] = ()
    guarantee: ClassVar[str] = ""
    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    precedes: ClassVar[frozenset[str]] = frozenset()
    single: ClassVar[bool] = False
    answered_by: ClassVar[str | None] = None
    writes: ClassVar[str | None] = None
    reads: ClassVar[str | None] = None
    example: ClassVar[str] = ""
    address: str | None = None  # where it listens, as a URL, once it does

    def __init__(self, config: ConfigT, context: OperatorContext) -> None:
        self.config = config
        self.context = context

    async def claim(self) -> None:
        """Take what another program could have, such as a port, before what takes long: loading the model.

        Only `sagellm run` asks for it; `open` must do it where nobody has. `close` lets go of it.
        """

    async def disclaim(self) -> None:
        """Let go of what `claim` took, since the flow will not run."""

    async def open(self) -> None:
        """Acquire what the operator needs. After a failure a new instance is opened, with the same `context.kept`."""

    async def run(self, inlet: AsyncIterator[list[Any]], out: Outlet) -> None:
        """Consume record lists until the inputs end. Sources ignore `inlet` and return when they have no more."""
        async for records in inlet:
            await self.process(records, out)
        await self.finish(out)

    def drain(self) -> bool:
        """The flow is to end: a source shall take no more requests.

        True: `run` has been told, calls `out.end()` and returns when it has nothing more to do, such as results that
        it still waits for. False: it is cancelled at its next checkpoint.
        """
        return False

    async def process(self, records: list[Any], out: Outlet) -> None:
        """Handle one list of records."""
        raise NotImplementedError(f"{type(self).__name__} must override process() or run()")

    async def finish(self, out: Outlet) -> None:
        """Send what is held back; the inputs have ended."""

    async def close(self) -> None:
        """Release everything; also called after a failure and on abort."""


OperatorT = TypeVar("OperatorT", bound=type[Operator[Any]])


def operator(name: str) -> Callable[[OperatorT], OperatorT]:
    """Register an operator class under the name that pipelines use as `type:`."""

    def decorate(cls: OperatorT) -> OperatorT:
        doc = (cls.__doc__ or "").strip()
        register(
            OperatorSpec(
                name=name,
                summary=doc.split("\n\n")[0].replace("\n", " "),
                guarantee=cls.guarantee,
                config_model=cls.config_model,
                inputs=cls.inputs,
                outputs=cls.outputs,
                requires=cls.requires,
                provides=cls.provides,
                precedes=cls.precedes,
                single=cls.single,
                answered_by=cls.answered_by,
                writes=cls.writes,
                reads=cls.reads,
                example=cls.example,
                factory=cls,
            )
        )
        return cls

    return decorate
