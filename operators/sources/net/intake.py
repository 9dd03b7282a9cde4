"""Where the requests of a listening source come in: bounded, refused with a reason, and each told an end."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import anyio
from pydantic import Field

from ....config import Config
from ....records import Completion, DeadLetter
from ....runtime.calls import Caller, tell_end
from ....runtime.flow.ledger import Outcome
from ....runtime.flow.mailbox import Mailbox

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ....records import Request, TokenDelta
    from ....runtime.flow.operator import OperatorContext, Outlet
    from .keys import Key

_RECENT_ENDS = 64  # by which the pace is judged
_RECENT_S = 30.0
_LONGEST_WAIT_S = 60


class IntakeConfig(Config):
    """`max_in_flight` requests of this source may be in the pipeline; one more is refused. After SIGTERM what is in
    flight has `drain_timeout_s` seconds, then it is cancelled."""

    max_in_flight: Annotated[int, Field(gt=0)] = 512
    drain_timeout_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request was not taken. After `retry_after_s` seconds, 1 to 60, it may be."""

    kind: Literal["shed", "rate_limit", "closing"]
    message: str
    queue_depth: int  # requests in the pipeline, and before it, that are not being computed
    retry_after_s: int


class Intake:
    """Takes the requests of one source, from any of its connections, on the flow's thread.

    Each request that `submit` takes is told exactly one end, by the pipeline or, when that is gone, from here.
    """

    def __init__(self, context: OperatorContext, config: IntakeConfig) -> None:
        self.context = context
        self.config = config
        self._clock = context.engine.clock
        self._arrivals: Mailbox[Request] = Mailbox()
        self._unsent: dict[int, Request] = {}
        self._open: dict[int, tuple[Request, float]] = {}  # with when they came, oldest first
        self._ends: deque[float] = deque(maxlen=_RECENT_ENDS)
        self._closing = anyio.Event()
        self._idle = anyio.Event()
        self._over: str | None = None

    # -- requests ------------------------------------------------------------------------------------------------------

    def submit(self, request: Request, caller: Caller, key: Key | None = None) -> Refusal | None:
        """Take a request for `caller`, who is told its deltas and its end; with a key it is the key's tenant's.

        Never blocks. A request that is refused is counted as shed, and nobody is told but who asked.
        """
        refusal = self._refuse(key)
        if refusal is not None:
            self.context.ledger.accept_shed(1)
            return refusal
        if key is not None:
            key.begin()
            request.tenant = key.tenant
        request.interactive = True
        request.caller = _Admitted(self, request, caller, key)
        self._open[id(request)] = (request, self._clock())
        self._unsent[id(request)] = request
        self._arrivals.put([request])
        return None

    def cancel(self, requests: Iterable[Request]) -> None:
        """End requests, and all copies of them, wherever they are."""
        ledger, inside = self.context.ledger, []
        for request in requests:
            if self._unsent.pop(id(request), None) is not None:
                request.cancelled = True
                ledger.accept([request])
                ledger.settle([(request, Outcome.CANCELLED)])
                tell_end(request, None, Outcome.CANCELLED)
            else:
                inside += ledger.copies_of(request)
        if inside:
            self.context.engine.cancel(inside)

    @property
    def in_flight(self) -> int:
        """Requests that were taken and have not been told their end."""
        return len(self._open)

    @property
    def queue_depth(self) -> int:
        """Requests that are not being computed: in the pipeline, or still before it."""
        inside = self.context.ledger.counters()["in_flight"] - self.context.engine.num_running
        return len(self._unsent) + max(inside, self.context.engine.num_waiting)

    def _refuse(self, key: Key | None) -> Refusal | None:
        if self._over is not None or self._closing.is_set():
            wait = min(_LONGEST_WAIT_S, max(1, math.ceil(self.config.drain_timeout_s)))
            return Refusal("closing", "the server is shutting down", self.queue_depth, wait)
        if len(self._open) >= self.config.max_in_flight:
            told = f"{len(self._open)} requests are in flight, as many as are taken"
            return Refusal("shed", told, self.queue_depth, self._time_to_room())
        if key is not None and (limited := key.find_limit()) is not None:
            message, wait_s = limited
            wait = min(_LONGEST_WAIT_S, max(1, math.ceil(wait_s)))
            return Refusal("rate_limit", message, self.queue_depth, wait)
        return None

    def _time_to_room(self) -> int:
        """Seconds until what waits now has begun, at the pace of late; without one, as long as the oldest is here."""
        now = self._clock()
        recent = [end for end in self._ends if end > now - _RECENT_S]
        if len(recent) > 1:
            wait = max(1, self.queue_depth) * (now - recent[0]) / len(recent)
        else:
            wait = now - next(iter(self._open.values()))[1]
        return min(_LONGEST_WAIT_S, max(1, math.ceil(wait)))

    def end(self, request: Request, record: Completion | DeadLetter | None, key: Key | None) -> None:
        """A request has been told its end."""
        if self._open.pop(id(request), None) is None:
            return
        self._unsent.pop(id(request), None)
        self._ends.append(self._clock())
        if key is not None:
            key.end(record.usage.total_tokens if isinstance(record, Completion) else 0)
        if not self._open:
            self._idle.set()

    # -- life ----------------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Take no more requests; `run` returns when those that are in flight have ended."""
        self._closing.set()
        self._arrivals.close()

    async def run(self, out: Outlet) -> None:
        """Move requests to `out` until drained, and wait for the ends of all.

        However it ends, everybody has been told an end; where it is cancelled, or raises, that is an error.
        """
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._keep_deadline)
                async for requests in self._arrivals:
                    # None of those that were cancelled meanwhile.
                    if entering := [request for request in requests if self._unsent.pop(id(request), None) is not None]:
                        await out.send(entering)
                await out.end()
                while self._open:
                    self._idle = anyio.Event()
                    await self._idle.wait()
                tasks.cancel_scope.cancel()
        finally:
            self.fail_all("the server was stopped before the request had ended")

    async def _keep_deadline(self) -> None:
        await self._closing.wait()
        await anyio.sleep(self.config.drain_timeout_s)
        self.cancel([request for request, _ in self._open.values()])

    def fail_all(self, reason: str) -> None:
        """Take nothing from now on, and tell everybody who is in flight an error."""
        self._over = self._over or reason
        self._arrivals.close()
        unsent, left = [*self._unsent.values()], [request for request, _ in self._open.values()]
        for request in left:
            tell_end(request, DeadLetter(reason, request=request), Outcome.ERROR)
        ledger = self.context.ledger
        ledger.accept(unsent)
        ledger.settle([(request, Outcome.ERROR) for request in unsent])
        self.cancel(left)  # nobody waits for what is still computed, if the flow goes on


class _Admitted(Caller):
    """Stands before a caller and counts its end."""

    def __init__(self, intake: Intake, request: Request, caller: Caller, key: Key | None) -> None:
        self.intake, self.request, self.caller, self.key = intake, request, caller, key

    def receive_delta(self, delta: TokenDelta) -> None:
        self.caller.receive_delta(delta)

    def receive_end(self, record: Any, outcome: Outcome) -> None:
        self.intake.end(self.request, record, self.key)
        self.caller.ended = True
        self.caller.receive_end(record, outcome)
