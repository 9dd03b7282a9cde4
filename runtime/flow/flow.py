"""A running dataflow: operators as tasks, channels between them, failures, draining, and the end."""

from __future__ import annotations

import logging
from collections import deque
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import anyio

from ...errors import ConfigError, ErrorRatioExceededError, FlowError, SageLLMError
from ...graph.operator_spec import RecordKind
from .channel import Channel
from .ledger import Outcome
from .supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence

    from ...graph.pipeline import Edge
    from ...records import Request
    from .ledger import Ledger
    from .operator import Operator

log = logging.getLogger("sageLLM")

RATIO_COUNTS_FROM = 20


@dataclass(frozen=True, slots=True)
class FlowReport:
    """How a run went: the ledger's counters, each operator's, seconds, and why it was drained (None: not)."""

    counters: dict[str, int]
    operators: dict[str, dict[str, int]]
    seconds: float
    drained: str | None = None


class Flow:
    """Runs operators that are connected by edges, once.

    Each operator lives in a task of its own. Every `open` ends before any `run` begins, sinks first. One that fails is
    closed and replaced by a new instance, as its restart policy allows, and what it had taken and not passed on goes
    to its error port; past that the flow fails. Whatever happens, each accepted request is settled when `run` ends.
    """

    def __init__(
        self,
        factories: Mapping[str, Callable[[], Operator[Any]]],
        edges: Sequence[Edge],
        ledger: Ledger,
        max_error_ratio: float | None = None,
        cancel: Callable[[list[Request]], None] | None = None,
        on_drained: Callable[[], None] | None = None,
    ) -> None:
        """Make the operators and connect them.

        `cancel` ends requests wherever they are; `on_drained` is called when the sources have been stopped.

        Raises:
            ConfigError: an edge names an operator that is not there or takes no input, the edges form a cycle, or
                sequences, which own KV blocks, are to be copied to several edges.
        """
        self.ledger = ledger
        self._max_error_ratio = max_error_ratio
        self._cancel = cancel or _mark_cancelled
        self._on_drained = on_drained
        self._order = _topological(factories, edges)
        self._supervisors = self._connect(factories, edges)
        self._scope: anyio.CancelScope | None = None
        self._began = self._ended = 0.0
        self._started = False
        self.has_ended = False  # from here on nothing but the end of what is in flight is settled
        self.running = anyio.Event()  # every operator is open
        self.draining = anyio.Event()
        self._drain_reason: str | None = None
        self._failure: SageLLMError | None = None
        self._aborted = False
        self._exceeded: ErrorRatioExceededError | None = None
        if max_error_ratio is not None:
            ledger.on_failed(self._check_ratio)

    def _connect(
        self, factories: Mapping[str, Callable[[], Operator[Any]]], edges: Sequence[Edge]
    ) -> dict[str, Supervisor]:
        inlets = {name: Channel(sum(edge.target == name for edge in edges)) for name in factories}
        outlets: dict[str, dict[str, list[Channel]]] = {name: {} for name in factories}
        for edge in edges:
            channels = outlets[edge.source].setdefault(edge.source_port, [])
            channels.append(inlets[edge.target])
            if len(channels) > 1 and RecordKind.SEQUENCE in edge.kinds:
                raise ConfigError(
                    f"{edge.source}.{edge.source_port} gives sequences, which cannot be copied to several operators: "
                    "leave one edge, or branch where requests or completions flow"
                )
        supervisors = {}
        for name, make in factories.items():
            supervisor = Supervisor(name, make, inlets[name], outlets[name], self.ledger, self._fail, self._cancel)
            if supervisor.is_source and any(edge.target == name for edge in edges):
                raise ConfigError(f"{name!r} is a source and takes no input: remove the edge that leads to it")
            supervisors[name] = supervisor
        return supervisors

    @property
    def operators(self) -> dict[str, Operator[Any]]:
        """The operators by name, as they are now."""
        return {name: supervisor.operator for name, supervisor in self._supervisors.items()}

    def snapshot(self) -> dict[str, dict[str, int]]:
        """Each operator's counters now, with the records that wait in its inlet."""
        return {
            name: {**asdict(supervisor.stats), "waiting": len(supervisor.channel)}
            for name, supervisor in self._supervisors.items()
        }

    def report(self) -> FlowReport:
        """How it goes, or went; also after `run` has raised."""
        stats = {name: asdict(supervisor.stats) for name, supervisor in self._supervisors.items()}
        return FlowReport(self.ledger.counters(), stats, self._ended - self._began, self._drain_reason)

    # -- from outside, on the flow's own event loop --------------------------------------------------------------------

    def drain(self, reason: str) -> None:
        """Stop the sources and finish what is in flight."""
        if self._drain_reason is None:
            log.info("draining: %s", reason)
            self._drain_reason = reason
            self.draining.set()
            for supervisor in self._supervisors.values():
                supervisor.drain()
            if self._on_drained is not None:
                self._on_drained()

    def abort(self, reason: str) -> None:
        """Stop at once; what is in flight ends as cancelled and `run` raises."""
        self._aborted = True
        self._fail(FlowError(f"aborted: {reason}"))

    def _fail(self, error: SageLLMError) -> None:
        if self._failure is None:
            self._failure = error
        elif error is not self._failure:
            log.error("after the flow had failed: %s", error)
        if self._scope is not None:
            self._scope.cancel()

    # -- running -----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def claimed(self) -> AsyncIterator[None]:
        """Around whatever is to be done before `run`, and that: operators hold from now on what others could take.

        Raises:
            ConfigError: it cannot be had, such as an address that is in use.
        """
        try:
            for operator in self.operators.values():
                await operator.claim()
            yield
        finally:
            if not self._started:
                for operator in self.operators.values():
                    await operator.disclaim()

    async def run(self) -> FlowReport:
        """Run until the sources have ended and everything in flight is finished.

        Raises:
            OperatorFailedError: an operator could not open or close, or failed more often than its policy allows.
            ErrorRatioExceededError: too large a share of records failed.
            FlowError: an operator with `on_error: fail` met a bad record, one left records unaccounted for, the run
                was aborted, or this flow has run already.
            SageLLMError: what an operator raised on purpose, such as SourceChangedError.
        """
        if self._started:
            raise FlowError("a flow runs once: build another one")
        self._started = True
        self._began = anyio.current_time()
        finished = False
        try:
            await self._run_tasks()
            finished = self._failure is None
        finally:
            self._ended = anyio.current_time()
            self.has_ended = True
            failed = self._failure is not None and not self._aborted
            self.ledger.fail_all(Outcome.ERROR if failed or finished else Outcome.CANCELLED)
            self.ledger.check()
        if self._failure is None:
            self._failure = self._unaccounted() or self._exceeded or self._ratio_error()
        if self._failure is not None:
            raise self._failure
        return self.report()

    async def _run_tasks(self) -> None:
        start = anyio.Event()
        async with anyio.create_task_group() as tasks:
            self._scope = tasks.cancel_scope
            for name in reversed(self._order):
                if self._failure is not None:
                    return
                await tasks.start(self._supervisors[name].live, start, name=f"operator {name}")
            start.set()
            self.running.set()

    def _unaccounted(self) -> FlowError | None:
        for name, supervisor in self._supervisors.items():
            if supervisor.unaccounted:
                return FlowError(
                    f"operator {name!r} took {supervisor.unaccounted} records that it neither sent nor rejected: "
                    "call out.drop(records) with those that it leaves out on purpose"
                )
        return None

    def _check_ratio(self) -> None:
        if self._exceeded is None and self.ledger.accepted >= RATIO_COUNTS_FROM:
            self._exceeded = self._ratio_error()
            if self._exceeded is not None:
                self.drain(str(self._exceeded))  # and not cut off: the dead letters say what is wrong

    def _ratio_error(self) -> ErrorRatioExceededError | None:
        ratio, limit = self.ledger.error_ratio, self._max_error_ratio
        if limit is None or ratio <= limit:
            return None
        return ErrorRatioExceededError(
            f"{ratio:.1%} of {self.ledger.accepted} records failed, more than max_error_ratio {limit:.1%}"
        )


def _mark_cancelled(requests: list[Request]) -> None:
    for request in requests:
        request.cancelled = True


def _topological(operators: Collection[str], edges: Sequence[Edge]) -> list[str]:
    """Names, each before those that it feeds; sources that are alike in the order given.

    Raises:
        ConfigError: the edges are not a DAG over these operators.
    """
    feeds = dict.fromkeys(operators, 0)
    for edge in edges:
        for end in (edge.source, edge.target):
            if end not in operators:
                raise ConfigError(f"edge {edge}: there is no operator {end!r}")
        feeds[edge.target] += 1
    ready = deque(name for name, count in feeds.items() if not count)
    order = []
    while ready:
        name = ready.popleft()
        order.append(name)
        for edge in edges:
            if edge.source == name:
                feeds[edge.target] -= 1
                if not feeds[edge.target]:
                    ready.append(edge.target)
    if len(order) < len(operators):
        raise ConfigError(f"the edges form a cycle through {', '.join(sorted(set(operators) - set(order)))}")
    return order
