"""One operator's life: open, run, close, in one task; a new instance after a failure, as the restart policy allows."""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, Any

import anyio

from ...errors import FlowError, KVCacheError, OperatorFailedError, RequestError, SageLLMError
from ...records import DeadLetter, TokenDelta
from .custody import Custody
from .ledger import Outcome, endings_of, request_of
from .ports import Inlet, NodeStats, PortOutlet

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio.abc import TaskStatus

    from ...records import Request
    from .channel import Channel
    from .ledger import Ledger
    from .operator import Operator

log = logging.getLogger("sageLLM")

CLOSE_LIMIT_S = 30.0


class Supervisor:
    """Keeps one operator running: `make` gives another instance after a failure.

    Every record that the operator took ends up sent, rejected, dropped, or in a dead letter.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Operator[Any]],
        inlet: Channel,
        channels: dict[str, list[Channel]],
        ledger: Ledger,
        fail: Callable[[SageLLMError], None],
        cancel: Callable[[list[Request]], None],
    ) -> None:
        self.name = name
        self._make = make
        self.operator = operator = make()
        self.stats = NodeStats()
        self.is_source = not operator.inputs
        self.is_sink = bool(operator.inputs) and all(port.name == "error" for port in operator.outputs)
        self.unaccounted = 0  # requests that it had not sent, rejected or dropped when it ended
        self.channel = inlet
        inlet.capacity = operator.config.buffer
        self._channels = channels
        self._ledger = ledger
        self._fail = fail
        self._cancel = cancel
        self._custody = Custody()
        self._inlet = Inlet(inlet, self._custody, self.stats, ledger, self.is_sink)
        self._outlet = PortOutlet(name, operator, channels, self._custody, self.stats, ledger, fail)
        self._failures: deque[float] = deque()
        self._is_open = self._to_close = False
        self._draining = False
        self._source_scope: anyio.CancelScope | None = None

    def drain(self) -> None:
        """A source stops by itself or at its next checkpoint; what it had begun to send is still sent."""
        self._draining = True
        if self._source_scope is not None and not self.operator.drain():
            self._source_scope.cancel()

    async def live(self, start: anyio.Event, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Open, report started, wait for `start`, run to the end, close."""
        try:
            try:
                await self._open()
            except Exception as error:
                self._fail(self._opening_failed(error))
                return
            finally:
                task_status.started()
            await start.wait()
            if await self._run_until_ended():
                await self._end()
        finally:
            await self._close()

    async def _open(self) -> None:
        self._to_close = True
        await self.operator.open()
        self._is_open = True

    def _opening_failed(self, error: Exception) -> SageLLMError:
        cause = _only(error)
        if isinstance(cause, SageLLMError):
            return cause
        failure = OperatorFailedError(f"operator {self.name!r} cannot open: {_describe(cause)}")
        failure.__cause__ = cause
        return failure

    async def _run_until_ended(self) -> bool:
        """Run, and after each failure reopen and run again. False when the flow has failed."""
        while not (self._draining and self.is_source):
            try:
                if not self._is_open:
                    self.operator = self._make()
                    await self._open()
                await self._run_once()
                return True
            except Exception as error:
                if not await self._recover(_only(error)):
                    return False
            except BaseExceptionGroup as group:  # failed while it was being cancelled
                cancelled, failed = group.split(anyio.get_cancelled_exc_class())
                if cancelled is None:
                    raise
                log.error("operator %r failed while it was cancelled: %r", self.name, failed)
                raise cancelled from None
        return True

    async def _run_once(self) -> None:
        if not self.is_source:
            await self.operator.run(self._inlet, self._outlet)
            return
        try:
            with anyio.CancelScope() as self._source_scope:
                if self._draining:
                    self._source_scope.cancel()
                await self.operator.run(self._inlet, self._outlet)
        finally:
            self._source_scope = None  # an instance that is being opened is not to be told of a drain

    async def _recover(self, error: BaseException) -> bool:
        """After a failure: account for what was held, close, wait. False when there is no going on."""
        if isinstance(error, SageLLMError) and not isinstance(error, (RequestError, KVCacheError)):
            self._fail(error)  # said on purpose: trying again changes nothing
            return False
        log.warning("operator %r failed: %s", self.name, _describe(error), exc_info=error)
        policy = self.operator.config.restart
        now = anyio.current_time()
        self._failures.append(now)
        while self._failures[0] < now - policy.window_s:
            self._failures.popleft()
        if len(self._failures) > policy.max_restarts:
            times = f"{len(self._failures)} times in {policy.window_s:g} s"
            failure = OperatorFailedError(f"operator {self.name!r} failed {times}, the last time: {_describe(error)}")
            failure.__cause__ = error
            self._fail(failure)
            return False
        try:
            await self._outlet.flush()
            await self._reject_held(error)
        except FlowError:
            return False  # on_error: fail has failed the flow
        self.stats.restarts += 1
        await self._close()
        await anyio.sleep(policy.backoff_s)
        return True

    async def _reject_held(self, error: BaseException) -> None:
        text = f"operator {self.name!r} failed: {_describe(error)}"
        if not self.is_sink:  # deltas may not have been passed on: a stream with a hole must not go on
            deltas = [record for record in self._inlet.last if type(record) is TokenDelta]
            self._cancel([delta.sequence.request for delta in deltas])
        letters, seen = [], set()
        for record in self._custody.take_all():
            request = request_of(record)
            if request is None or not self._ledger.is_open(request):
                continue
            if id(request) in seen:
                self._ledger.settle([(request, Outcome.ERROR)])
                continue
            seen.add(id(request))
            raw = record.raw if isinstance(record, DeadLetter) else ""
            letters.append(DeadLetter(text, raw=raw, src=request.src, request=request))
        self._custody.take(letters)
        self._inlet.last = []
        self._ledger.condemn([letter.request for letter in letters if letter.request is not None])
        await self._outlet.reject(letters)

    async def _end(self) -> None:
        """The operator's run is over: deliver the rest, close what is downstream, account for what is left."""
        await self._outlet.flush()
        if self.is_sink:
            self._inlet.settle_sunk()
        elif left := self._custody.take_all():
            self.unaccounted = len(left)
            self._ledger.settle([(request, Outcome.ERROR) for request, _ in endings_of(left)])
        await self._outlet.end()
        if not self.is_source and not self._inlet.ended and (refused := await self._inlet.refuse_rest()):
            log.warning("operator %r ended before its inputs: %d more records were refused", self.name, refused)

    async def _close(self) -> None:
        if not self._to_close:
            return
        was_open, self._is_open, self._to_close = self._is_open, False, False
        with anyio.move_on_after(CLOSE_LIMIT_S, shield=True) as scope:
            try:
                await self.operator.close()
            except Exception as error:
                cause = _only(error)
                if not was_open:  # what the failed `open` did not acquire cannot be released
                    log.debug("closing operator %r after it could not open: %r", self.name, cause)
                    return
                failure = OperatorFailedError(f"operator {self.name!r} failed to close: {_describe(cause)}")
                failure.__cause__ = cause
                self._fail(failure)
        if scope.cancelled_caught:
            self._fail(OperatorFailedError(f"operator {self.name!r} did not close within {CLOSE_LIMIT_S:g} s"))


def _only(error: BaseException) -> BaseException:
    """The error itself where a task group has wrapped a single one; of several, one that was raised on purpose."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    causes = [_only(inner) for inner in error.exceptions]
    return next((cause for cause in causes if isinstance(cause, SageLLMError)), causes[0])


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
