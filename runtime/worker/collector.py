"""Reads a step's result into the resident table: vectorised over rows, one by one only for those that are watched."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from ...records import FinishReason, TokenDelta, TokenLogprobs
from ..scheduler.resident import RowState

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from ...records import Choice, Sequence
    from ..scheduler.plan import StepPlan, StepResult
    from ..scheduler.resident import ResidentTable
    from .stop_strings import StopStringMatcher

    MakeStopMatcher = Callable[[Sequence], StopStringMatcher]


class Collector:
    """Applies results. `end_row(slot, reason)` is called for each decoding row that ended."""

    def __init__(
        self,
        table: ResidentTable,
        make_stop_matcher: MakeStopMatcher,
        end_row: Callable[[int, FinishReason], None],
    ) -> None:
        self._table = table
        self._make_stop_matcher = make_stop_matcher
        self._end_row = end_row
        self._matchers: dict[int, StopStringMatcher] = {}
        self._matched: dict[int, str] = {}

    def watch(self, slot: int, sequence: Sequence) -> None:
        """Note what must be looked at token by token for a row that enters."""
        sampling = sequence.sampling
        self._matched.pop(slot, None)
        self._matchers.pop(slot, None)
        if sampling.stop:
            self._matchers[slot] = self._make_stop_matcher(sequence)
        self._table.watched[slot] = sequence.request.stream or bool(sampling.stop) or sampling.logprobs is not None

    def collect(
        self, plan: StepPlan, result: StepResult, prefilled: list[Sequence], decoded: list[Sequence | TokenDelta]
    ) -> None:
        """Store a step's tokens, append finished prompts to `prefilled` and deltas to `decoded`, end what ended."""
        table = self._table
        for index, logprobs in result.prompt_logprobs.items():
            self._store_prompt_logprobs(plan, index, logprobs)
        alive = table.epoch[plan.sample_slots] == plan.sample_epochs
        slots, tokens = plan.sample_slots, result.tokens
        rows: NDArray[np.int64] | None = None
        if not alive.all():
            rows = np.flatnonzero(alive)
            slots, tokens = slots[rows], tokens[rows]
        if not len(slots):
            return
        now = time.monotonic()
        count = table.outputs_read[slots]
        table.outputs[slots, count] = tokens
        table.outputs_read[slots] = count + 1
        first = slots[count == 0]
        table.first_time[first] = now
        table.last_time[slots] = now
        if table.watched[slots].any():
            for at in np.flatnonzero(table.watched[slots]).tolist():
                self._look_at(int(slots[at]), at if rows is None else int(rows[at]), result, decoded)
        if len(first):
            self._give_back_prefilled(first, now, prefilled)
        stopped = (tokens[:, None] == table.stop_ids[slots]).any(axis=1)
        ended = stopped | (count + 1 >= table.max_outputs[slots])
        if self._matched:
            ended |= np.isin(slots, list(self._matched))
        for slot in slots[ended].tolist():
            if table.state[slot] == RowState.DECODE:
                reason = self.reason_to_end(slot)
                assert reason is not None
                self._end_row(slot, reason)

    def _give_back_prefilled(self, slots: NDArray[np.int64], now: float, prefilled: list[Sequence]) -> None:
        for slot in slots.tolist():
            row = self._table.rows[slot]
            assert row is not None
            owner = row.owner
            if row.choice.index == 0 and not owner.decoding:
                owner.sequence.timings.first_token = now
                owner.lease.blocks = self._table.row_blocks(slot)
                owner.posted = True
                prefilled.append(owner.sequence)

    def _look_at(self, slot: int, at: int, result: StepResult, decoded: list[Sequence | TokenDelta]) -> None:
        table = self._table
        row = table.rows[slot]
        assert row is not None
        sequence, token = row.owner.sequence, int(result.tokens[at])
        if sequence.request.stream and row.owner.decoding:
            decoded.append(TokenDelta(sequence, row.choice.index, [token]))
        matcher = self._matchers.get(slot)
        if matcher is not None:
            found = matcher.push([token])
            if found is not None:
                self._matched[slot] = found[1]
        wanted = sequence.sampling.logprobs
        if wanted is not None and result.logprobs is not None:
            top: list[tuple[int, float]] = []
            if wanted and result.top_ids is not None and result.top_logprobs is not None:
                ids, values = result.top_ids[at, :wanted].tolist(), result.top_logprobs[at, :wanted].tolist()
                top = list(zip(ids, values, strict=True))
            if row.choice.logprobs is None:
                row.choice.logprobs = []
            row.choice.logprobs.append(TokenLogprobs(token, float(result.logprobs[at]), top))

    def _store_prompt_logprobs(self, plan: StepPlan, index: int, logprobs: list[TokenLogprobs]) -> None:
        chunk = plan.chunks[index]
        row = self._table.rows[chunk.slot]
        if row is None:
            return
        sequence = row.owner.sequence
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

    def reason_to_end(self, slot: int) -> FinishReason | None:
        """Why a row has ended, looking at its last token; None if it goes on."""
        table = self._table
        if slot in self._matched:
            return FinishReason.STOP
        count = int(table.outputs_read[slot])
        if (table.outputs[slot, count - 1] == table.stop_ids[slot]).any():
            return FinishReason.STOP
        return FinishReason.LENGTH if count >= table.max_outputs[slot] else None

    def fill_choice(self, slot: int, choice: Choice, reason: FinishReason) -> None:
        """Write a row's outputs into its choice and its times into its sequence."""
        table = self._table
        row = table.rows[slot]
        assert row is not None
        choice.output_tokens = table.outputs[slot, : table.outputs_read[slot]].tolist()
        choice.finish_reason = reason
        matched = self._matched.pop(slot, None)
        self._matchers.pop(slot, None)
        if matched is not None:
            choice.stop_matched = matched
        elif reason is FinishReason.STOP:
            choice.stop_matched = choice.output_tokens[-1]
        timings = row.owner.sequence.timings
        if choice.output_tokens:
            timings.last_token = max(timings.last_token or 0.0, float(table.last_time[slot]))
