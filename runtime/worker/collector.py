"""Reads a step's result into the resident table: vectorised over rows, one by one only for those that are watched."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...records import FinishReason, Pooling, TokenDelta, TokenLogprobs
from ..scheduler.resident import RowState

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from ...records import Choice, Sequence
    from ..scheduler.plan import PromptChunk, StepPlan, StepResult
    from ..scheduler.resident import ResidentSequence, ResidentTable
    from .stop_strings import StopStringMatcher

    Ending = tuple[int, FinishReason]  # a slot, and why its row ends
    MakeStopMatcher = Callable[[Sequence], StopStringMatcher]


class Collector:
    """Applies results. `end_rows` is called with the decoding rows that ended, as (slot, reason)."""

    def __init__(
        self,
        table: ResidentTable,
        make_stop_matcher: MakeStopMatcher,
        end_rows: Callable[[list[Ending]], None],
        clock: Callable[[], float],
    ) -> None:
        self._table = table
        self._make_stop_matcher = make_stop_matcher
        self._end_rows = end_rows
        self._clock = clock
        self._matchers: dict[int, StopStringMatcher] = {}
        self._matched: dict[int, str] = {}
        self._conforming: set[int] = set()  # slots whose guide allows nothing more

    def watch(self, slot: int, sequence: Sequence, conforms: bool = False) -> None:
        """Note what must be looked at token by token for a row that enters, and whether its guide allows no more."""
        if conforms:
            self._conforming.add(slot)
        sampling = sequence.sampling
        if sampling.stop:
            self._matchers[slot] = self._make_stop_matcher(sequence)
        if sequence.request.stream or sampling.stop or sampling.logprobs is not None:
            self._table.watched[slot] = True

    def collect(
        self, plan: StepPlan, result: StepResult, prefilled: list[Sequence], decoded: list[Sequence | TokenDelta]
    ) -> None:
        """Store a step's tokens, append finished prompts to `prefilled` and deltas to `decoded`, end what ended."""
        table = self._table
        for index, logprobs in result.prompt_logprobs.items():
            self._store_prompt_logprobs(plan, index, logprobs)
        for index, hidden in result.pooled.items():
            self._pool(plan.chunks[index], hidden, prefilled)
        alive = table.epoch[plan.sample_slots] == plan.sample_epochs
        for index in result.conforming:
            row = table.rows[plan.sample_slots[index]]
            if alive[index] and row is not None:
                row.choice.conforms = True
                self._conforming.add(int(plan.sample_slots[index]))
        slots, tokens = plan.sample_slots, result.tokens
        rows: NDArray[np.int64] | None = None
        if not alive.all():
            rows = np.flatnonzero(alive)
            slots, tokens = slots[rows], tokens[rows]
        if not len(slots):
            return
        now = self._clock()
        count = table.outputs_read[slots]
        table.outputs[slots, count] = tokens
        table.outputs_read[slots] = count + 1
        first = slots[count == 0]
        table.first_time[first] = now
        table.last_time[slots] = now
        watched = np.flatnonzero(table.watched[slots])
        if len(watched):
            at = watched if rows is None else rows[watched]
            self._look_at(slots[watched].tolist(), at.tolist(), tokens[watched].tolist(), result, decoded)
        if len(first):
            self._give_back_prefilled(first, now, prefilled)
        ended = self.find_ended(slots[table.is_in(RowState.DECODE, slots)])
        if ended:
            self._end_rows(ended)

    def _give_back_prefilled(self, slots: NDArray[np.int64], now: float, prefilled: list[Sequence]) -> None:
        for slot in slots.tolist():
            row = self._table.rows[slot]
            assert row is not None
            owner = row.owner
            if row.choice.index == 0 and not owner.decoding:
                owner.sequence.timings.first_token = now
                self._post(slot, owner, prefilled)

    def _post(self, slot: int, owner: ResidentSequence, prefilled: list[Sequence]) -> None:
        owner.lease.blocks = self._table.row_blocks(slot)
        owner.posted = True
        prefilled.append(owner.sequence)

    def _look_at(
        self, slots: list[int], rows: list[int], tokens: list[int], result: StepResult,
        decoded: list[Sequence | TokenDelta],
    ) -> None:  # fmt: skip
        for slot, at, token in zip(slots, rows, tokens, strict=True):
            row = self._table.rows[slot]
            assert row is not None
            sequence = row.owner.sequence
            if row.owner.decoding and sequence.request.stream:
                decoded.append(TokenDelta(sequence, row.choice.index, [token]))
            if slot in self._matchers:
                self.push(slot, [token])
            if result.logprobs is not None and sequence.sampling.logprobs is not None:
                self._store_logprobs(row.choice, sequence.sampling.logprobs, token, at, result)

    @staticmethod
    def _store_logprobs(choice: Choice, wanted: int, token: int, at: int, result: StepResult) -> None:
        assert result.logprobs is not None
        top: list[tuple[int, float]] = []
        if wanted and result.top_ids is not None and result.top_logprobs is not None:
            ids, values = result.top_ids[at, :wanted].tolist(), result.top_logprobs[at, :wanted].tolist()
            top = list(zip(ids, values, strict=True))
        if choice.logprobs is None:
            choice.logprobs = []
        choice.logprobs.append(TokenLogprobs(token, float(result.logprobs[at]), top))

    def _owner_of(self, chunk: PromptChunk) -> ResidentSequence | None:
        """None if the row has ended; another one may have its slot."""
        row = self._table.rows[chunk.slot]
        return None if row is None or self._table.epoch[chunk.slot] != chunk.epoch else row.owner

    def _pool(self, chunk: PromptChunk, hidden: NDArray[np.float32], prefilled: list[Sequence]) -> None:
        owner = self._owner_of(chunk)
        if owner is None:
            return
        if chunk.pooling is Pooling.MEAN and chunk.start:  # what is computed again begins at 0
            assert owner.pooled is not None
            hidden = owner.pooled + hidden
        owner.pooled = hidden
        if chunk.is_last:
            length = np.linalg.norm(hidden)
            owner.sequence.embedding = hidden / length if length else hidden
            self._post(chunk.slot, owner, prefilled)

    def _store_prompt_logprobs(self, plan: StepPlan, index: int, logprobs: list[TokenLogprobs]) -> None:
        chunk = plan.chunks[index]
        owner = self._owner_of(chunk)
        if owner is None:
            return
        sequence = owner.sequence
        if sequence.prompt_logprobs is None:
            sequence.prompt_logprobs = [None]
        # A prompt that was preempted and computed again tells the same positions twice.
        del sequence.prompt_logprobs[chunk.start + 1 :]
        sequence.prompt_logprobs.extend(logprobs)

    def emit_first(self, slot: int, decoded: list[Sequence | TokenDelta]) -> None:
        """Stream the tokens that a row got before it came to decode."""
        row = self._table.rows[slot]
        assert row is not None
        tokens = self._table.outputs[slot, : self._table.outputs_read[slot]].tolist()
        decoded.append(TokenDelta(row.owner.sequence, row.choice.index, tokens))

    def find_ended(self, slots: NDArray[np.int64]) -> list[Ending]:
        """Those of the rows, which have a token each, that have ended, looking at their last tokens."""
        table = self._table
        count = table.outputs_read[slots]
        stopped = (table.outputs[slots, count - 1][:, None] == table.stop_ids[slots]).any(axis=1)
        if self._matched:
            stopped |= np.isin(slots, list(self._matched))
        if self._conforming:
            stopped |= np.isin(slots, list(self._conforming))
        ended = stopped | (count >= table.max_outputs[slots])
        if not ended.any():
            return []
        reasons = (FinishReason.STOP if stop else FinishReason.LENGTH for stop in stopped[ended].tolist())
        return list(zip(slots[ended].tolist(), reasons, strict=True))

    def push(self, slot: int, tokens: list[int]) -> None:
        """Note what a row that enters has produced elsewhere."""
        matcher = self._matchers.get(slot)
        if matcher is not None and (found := matcher.push(tokens)) is not None:
            self._matched[slot] = found[1]

    def forget(self, slots: list[int]) -> None:
        """Rows leave without an end."""
        for slot in slots:
            self._matched.pop(slot, None)
            self._matchers.pop(slot, None)
            self._conforming.discard(slot)

    def fill_choices(self, endings: list[Ending]) -> None:
        """Write rows' outputs into their choices and their times into their sequences."""
        table = self._table
        slots = [slot for slot, _ in endings]
        counts = table.outputs_read[slots]
        outputs = table.outputs[slots, : counts.max()].tolist()
        columns = (endings, outputs, counts.tolist(), table.last_time[slots].tolist())
        for (slot, reason), tokens, count, last_time in zip(*columns, strict=True):
            row = table.rows[slot]
            assert row is not None
            choice, timings = row.choice, row.owner.sequence.timings
            choice.output_tokens = tokens[:count]
            choice.finish_reason = reason
            matched = self._matched.pop(slot, None)
            self._matchers.pop(slot, None)
            if matched is not None:
                choice.stop_matched = matched
            elif count and reason is FinishReason.STOP and slot not in self._conforming:
                choice.stop_matched = tokens[count - 1]
            self._conforming.discard(slot)
            if count:
                timings.last_token = max(timings.last_token or 0.0, last_time)
