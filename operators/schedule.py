"""schedule: grants leases. The source of backpressure."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio
from pydantic import Field

from ..config import InferenceMode
from ..errors import RequestError
from ..records import NO_LIMIT, DeadLetter
from ..runtime.flow.mailbox import Mailbox
from ..runtime.flow.operator import ERROR_PORT, Operator, OperatorConfig, Outlet, Port, RecordKind, operator
from ..runtime.scheduler.policies import check_heeded
from ..runtime.worker.sampling_checks import check_sampling

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ..records import Sequence
    from ..runtime.scheduler.waiting import WaitingQueue

_SEQUENCE = frozenset({RecordKind.SEQUENCE})


class ScheduleConfig(OperatorConfig):
    """Bounds what waits for a lease; once it has reached one of them the inputs are not read.

    `max_waiting` counts sequences, `max_waiting_tokens` the tokens of their prompts and `max_waiting_blocks` the KV
    blocks that these fill, whether cached or not (None: no bound).
    """

    max_waiting: int = Field(default=256, gt=0)
    max_waiting_tokens: int | None = Field(default=None, gt=0)
    max_waiting_blocks: int | None = Field(default=None, gt=0)

    def is_reached(self, waiting: WaitingQueue) -> bool:
        """Whether nobody else may begin to wait."""
        return (
            len(waiting) >= self.max_waiting
            or (self.max_waiting_tokens is not None and waiting.tokens >= self.max_waiting_tokens)
            or (self.max_waiting_blocks is not None and waiting.blocks >= self.max_waiting_blocks)
        )


def _cut(sequence: Sequence, max_new_tokens: int) -> None:
    """Let its outputs be no longer than so, but for one token: what cannot have that is refused."""
    sampling, most = sequence.sampling, max(max_new_tokens, 1)
    if sampling.max_new_tokens > most:
        fewest = min(sampling.min_tokens, most)
        sequence.sampling = replace(sampling, max_new_tokens=most, min_tokens=fewest)


def _check_guided(sequence: Sequence) -> None:
    guide = sequence.request.guide
    if guide is not None and sequence.guide is None:
        raise RequestError(
            f"the request asks for an output that conforms to a {guide.kind}, but no `guide` stage has seen it: write "
            "`tokenize -> guide -> ...` under edges"
        )


@operator("schedule")
class Schedule(Operator[ScheduleConfig]):
    """Lets a sequence pass when there is a running slot for it and KV blocks for its prompt, in the policy's order.

    A prompt whose prefix is being computed right now waits for it rather than compute it twice. Cancelled sequences
    and those past a timeout leave at once, ended, and later stages pass them on. What can never fit is
    rejected, and so is a `pin` for which there is no room. Whoever asks for as many tokens as fit (`NO_LIMIT`) gets
    those that fit into the KV pool beside what is pinned.

    When the run is being ended (SIGTERM), lines of a file that have no lease yet end here, for the next run to compute.

    Guarantee: every sequence leaves exactly once, on `out` or `error`; granted in the policy's order, by default that
    of arrival, except behind a prefix that is being computed.
    """

    config_model = ScheduleConfig
    inputs = (Port("in", _SEQUENCE),)
    outputs = (Port("out", _SEQUENCE), ERROR_PORT)
    requires = frozenset({"tokenized"})
    provides = frozenset({"leased"})
    single = True  # one worker, one door of each kind
    guarantee = "every sequence leaves exactly once, on `out` or `error`"
    example = "schedule: {max_waiting: 256}"

    async def open(self) -> None:
        engine = self.context.engine
        self._leases, self._waiting = engine.leases, engine.waiting
        self._returned: Mailbox[None] = Mailbox()
        self._room = anyio.Event()
        self._ended = False
        engine.worker.on_leases_returned = self._wake

    def _wake(self) -> None:
        self._returned.put([None])

    async def run(self, inlet: AsyncIterator[list[Any]], out: Outlet) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._read, inlet, out)
            await self._grant(out)

    async def _read(self, inlet: AsyncIterator[list[Any]], out: Outlet) -> None:
        vocab_size = self.context.engine.model.vocab_size
        policy = self.context.engine.config.scheduler.policy
        async for records in inlet:
            refused = []
            for sequence in records:
                try:
                    _check_guided(sequence)
                    check_heeded(sequence.request, policy)
                    if sequence.request.pooling is None:
                        check_sampling(sequence.sampling, vocab_size)
                    leases, pins = self._leases, self.context.engine.pins
                    if sequence.request.sampling.max_new_tokens == NO_LIMIT:
                        _cut(sequence, leases.max_outputs(sequence, pins.room(sequence)))
                    leases.check_fits(sequence)
                    pins.check(sequence, leases.prompt_blocks(sequence), leases.max_blocks(sequence))
                    self._waiting.offer(sequence)
                except RequestError as error:
                    refused.append(DeadLetter.refusing(sequence.request, error))
            if refused:
                await out.reject(refused)
            self._wake()
            while self.config.is_reached(self._waiting):
                self._room = anyio.Event()
                await self._room.wait()
        self._ended = True
        self._wake()

    async def _grant(self, out: Outlet) -> None:
        while True:
            if self.context.engine.lets_go:
                out.drop(self._waiting.take_lines(self.context.ledger.is_copied))
            passing: list[Sequence] = self._waiting.take_ended() + self._waiting.take_granted()
            if not self.config.is_reached(self._waiting):
                self._room.set()
            if passing:
                await self._pass_on(passing, out)
                continue
            if self._ended and not len(self._waiting):
                return
            with anyio.move_on_after(self._time_to_timeout()):
                await self._returned.get()

    async def _pass_on(self, sequences: list[Sequence], out: Outlet) -> None:
        config = self.context.engine.config
        if config.inference_mode is InferenceMode.DECODE_ONLY and config.scheduler.on_transfer_failure == "fail":
            size = config.kv_cache.block_size
            refused = [
                DeadLetter(
                    f"{missing} KV blocks of the prompt are not in kv_cache.nvme_path, or could not be fetched",
                    src=sequence.request.src,
                    request=sequence.request,
                )
                for sequence in sequences
                if not sequence.ended
                and (missing := (len(sequence.prompt_tokens) - 1) // size - sequence.prefix_hit_tokens // size) > 0
            ]
            if refused:
                gone = {id(letter.request) for letter in refused}
                sequences = [sequence for sequence in sequences if id(sequence.request) not in gone]
                await out.reject(refused)  # which gives their leases back
        if sequences:
            await out.send(sequences)

    def _time_to_timeout(self) -> float | None:
        earliest = self._waiting.next_timeout()
        return None if earliest == float("inf") else max(0.0, earliest - self.context.engine.clock())

    async def close(self) -> None:
        self._returned.close()
        self._waiting.clear()
