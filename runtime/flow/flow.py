"""A running dataflow: operators as tasks, channels between them, failures, draining, and the end."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import anyio

from ...errors import ErrorRatioExceededError, FlowError, OperatorFailedError, SageLLMError
from .channel import Channel
from .node import Node

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ...graph.pipeline import Edge
    from .ledger import Ledger
    from .operator import Operator

log = logging.getLogger("sageLLM")

CLOSE_LIMIT_S = 30.0
RATIO_COUNTS_FROM = 20


@dataclass(frozen=True, slots=True)
class FlowReport:
    """How a run went: the ledger's counters, each operator's, and the time in seconds."""

    counters: dict[str, int]
    operators: dict[str, dict[str, int]]
    seconds: float


class Flow:
    """Runs operators that are connected by edges, once.

    Every `open` ends before any `run` begins, sinks first. A failed operator is opened again as its restart policy
    allows; past that the flow fails. Whatever happens, each accepted request is settled when `run` returns or raises.
    """

    def __init__(
        self,
        factories: Mapping[str, Callable[[], Operator[Any]]],
        edges: Sequence[Edge],
        ledger: Ledger,
        max_error_ratio: float | None = None,
    ) -> None:
        self.ledger = ledger
        self._max_error_ratio = max_error_ratio
        self._nodes = {name: Node(name, make, make(), ledger) for name, make in factories.items()}
        self._sources: dict[str, anyio.CancelScope] = {}
        self._scope = anyio.CancelScope()
        self._drain_reason: str | None = None
        self._failure: SageLLMError | None = None
        self._connect(edges)
        if max_error_ratio is not None:
            ledger.on_failed(self._check_ratio)

    def _connect(self, edges: Sequence[Edge]) -> None:
        for name, node in self._nodes.items():
            senders = sum(edge.target == name for edge in edges)
            if node.operator.inputs:
                node.inlet = Channel(node.operator.config.buffer, senders)
        for edge in edges:
            target = self._nodes[edge.target].inlet
            if target is None:
                raise FlowError(f"edge {edge.source} -> {edge.target}: {edge.target} has no input")
            self._nodes[edge.source].outlets.setdefault(edge.source_port, []).append(target)

    @property
    def operators(self) -> dict[str, Operator[Any]]:
        """The operators by name, as they are now."""
        return {name: node.operator for name, node in self._nodes.items()}

    def snapshot(self) -> dict[str, dict[str, int]]:
        """Each operator's counters now, with the records that wait in its inlet."""
        return {
            name: {**asdict(node.stats), "waiting": len(node.inlet or ())} for name, node in self._nodes.items()
        }

    # -- from outside ------------------------------------------------------------------------------------------------

    def drain(self, reason: str) -> None:
        """Stop the sources and finish what is in flight. On the flow's own event loop."""
        if self._drain_reason is None:
            log.info("draining: %s", reason)
            self._drain_reason = reason
        for scope in self._sources.values():
            scope.cancel()

    def abort(self, reason: str) -> None:
        """Stop at once; what is in flight ends with an error and `run` raises. On the flow's own event loop."""
        self._fail(FlowError(f"aborted: {reason}"))

    def _fail(self, error: FlowError) -> None:
        if self._failure is None:
            self._failure = error
        self._scope.cancel()

    # -- running -----------------------------------------------------------------------------------------------------

    async def run(self) -> FlowReport:
        """Run until the sources have ended and everything in flight is finished.

        Raises:
            OperatorFailedError: an operator failed more often than its restart policy allows.
            ErrorRatioExceededError: too large a share of records failed.
            FlowError: an operator with `on_error: fail` met a bad record, the run was aborted, or records vanished.
            SageLLMError: an operator cannot open, or cannot go on (SourceChangedError, OutputLockedError, ModelError).
        """
        start = time.monotonic()
        opened: list[Node] = []
        try:
            with self._scope:
                for node in sorted(self._nodes.values(), key=lambda node: (node.is_source, not node.is_sink)):
                    opened.append(node)
                    await node.operator.open()
                async with anyio.create_task_group() as tasks:
                    for node in self._nodes.values():
                        tasks.start_soon(self._run_node, node, name=f"operator {node.name}")
        except BaseExceptionGroup as group:
            meant, others = group.split(SageLLMError)
            if others is not None:
                raise
            assert meant is not None
            self._failure = self._failure or _first(meant)
        finally:
            with anyio.CancelScope(shield=True):
                for node in opened:
                    await self._close(node)
            vanished = self.ledger.counters()["in_flight"]
            self.ledger.fail_all()
            self.ledger.check()
        if self._failure is not None:
            raise self._failure
        if vanished:
            raise FlowError(f"{vanished} requests vanished: an operator neither sent, rejected nor dropped them")
        self._check_ratio(final=True)
        if self._failure is not None:
            raise self._failure
        stats = {name: asdict(node.stats) for name, node in self._nodes.items()}
        return FlowReport(self.ledger.counters(), stats, time.monotonic() - start)

    async def _run_node(self, node: Node) -> None:
        with anyio.CancelScope() as scope:
            if node.is_source:
                self._sources[node.name] = scope
                if self._drain_reason is not None:
                    scope.cancel()
            while True:
                try:
                    await node.operator.run(node.records(), node)
                    break
                except SageLLMError:
                    raise  # meant: another instance would meet the same
                except Exception as error:
                    await self._restart(node, error)
        if not self._scope.cancel_called:
            node.end()

    async def _restart(self, node: Node, error: Exception) -> None:
        log.warning("operator %s failed: %r", node.name, error)
        letters = node.take_unfinished(error)
        if not node.may_restart():
            window = node.operator.config.restart.window_s
            raise OperatorFailedError(
                f"operator {node.name} failed {len(node.failures)} times in {window:g} s, "
                f"the last time with {type(error).__name__}: {error}"
            ) from error
        node.stats.restarts += 1
        await node.reject(letters)
        await self._close(node)
        await anyio.sleep(node.operator.config.restart.backoff_s)
        node.operator = node.make()
        await node.operator.open()

    async def _close(self, node: Node) -> None:
        with anyio.move_on_after(CLOSE_LIMIT_S, shield=True) as scope:
            try:
                await node.operator.close()
            except Exception:
                log.exception("operator %s failed to close", node.name)
        if scope.cancelled_caught:
            log.error("operator %s did not close within %g s", node.name, CLOSE_LIMIT_S)

    def _check_ratio(self, *, final: bool = False) -> None:
        ratio, accepted = self.ledger.error_ratio, self.ledger.accepted
        limit = self._max_error_ratio
        if limit is not None and ratio > limit and (final or accepted >= RATIO_COUNTS_FROM):
            self._fail(
                ErrorRatioExceededError(
                    f"{ratio:.1%} of {accepted} records failed, more than max_error_ratio {limit:.1%}"
                )
            )


def _first(group: BaseExceptionGroup[SageLLMError]) -> SageLLMError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, SageLLMError)
    return error
