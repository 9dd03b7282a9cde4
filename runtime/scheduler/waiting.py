"""The waiting queue: sequences that have no lease yet, and how long they may wait for one."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ...records import Choice, FinishReason, Sequence
from .lease import PrefixHint
from .timeouts import NEVER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ...records import Request
    from .handover import PairedLeases
    from .lease import LeaseBook
    from .timeouts import Timeouts


def end_unstarted(sequence: Sequence, reason: FinishReason, now: float) -> None:
    """Finish a sequence that has computed nothing; `now` is in the engine's monotonic seconds."""
    sequence.choices = [Choice(index, finish_reason=reason) for index in range(sequence.sampling.n)]
    sequence.timings.finished = now
    sequence.kv = None


class WaitingQueue:
    """Sequences that wait for a lease, in the policy's order.

    A sequence whose prefix a running prompt computes, or whose KV comes up from a lower tier, is passed over and keeps
    its place. `tokens` and `blocks` are what the prompts of all that wait come to, and the KV blocks that they fill.
    `clock` gives monotonic seconds.
    """

    def __init__(
        self, leases: LeaseBook | PairedLeases, timeouts: Timeouts, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._leases = leases
        self._timeouts = timeouts
        self._clock = clock
        self._waiting = leases.policy
        self._interactive = 0  # only these may meet a timeout
        self._looked_at = float("-inf")  # when somebody could have been granted a lease
        self.tokens = 0
        self.blocks = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def offer(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        sequence.timings.queued = self._clock()
        self._waiting.add(sequence)
        self._interactive += sequence.request.interactive
        self.tokens += len(sequence.prompt_tokens)
        self.blocks += self._leases.prompt_blocks(sequence)

    def _remove(self, sequences: list[Sequence]) -> None:
        self._waiting.remove(sequences)
        for sequence in sequences:
            self._interactive -= sequence.request.interactive
            self.tokens -= len(sequence.prompt_tokens)
            self.blocks -= self._leases.prompt_blocks(sequence)
        if any(sequence is self._leases.claimant for sequence in sequences):
            self._leases.claim_for(None)

    def clear(self) -> None:
        """Forget everybody: whoever queued them answers for them."""
        self._remove([*self._waiting])

    def take_granted(self) -> list[Sequence]:
        """Grant leases in the policy's order until one does not fit; the granted carry their lease in `kv`.

        Whose claim has been met comes before all others. Where KV blocks are what is lacking, one of the policy's
        claimants claims them.
        """
        leases = self._leases
        self._looked_at = self._clock()
        slots, blocks = leases.room()
        first, candidates, lacks_blocks = leases.has_room_for, list[Sequence](), False
        for sequence in self._in_order(first) if slots else ():
            if sequence.sampling.n > slots:
                break
            if blocks <= 0 and sequence is not first:
                lacks_blocks = True
                break
            if self._may_start(sequence):
                candidates.append(sequence)
                slots -= sequence.sampling.n
                blocks -= leases.estimate_blocks(sequence)
        granted = []
        now = self._clock()
        for sequence, lease in zip(candidates, leases.grant(candidates), strict=False):
            sequence.kv = lease
            sequence.prefix_hit_tokens = lease.hit_tokens
            sequence.timings.scheduled = now
            granted.append(sequence)
        self._remove(granted)
        self._claim(lacks_blocks or len(granted) < len(candidates))
        return granted

    def _in_order(self, first: Sequence | None) -> Iterator[Sequence]:
        if first is not None:
            yield first
        yield from (sequence for sequence in self._waiting.in_order() if sequence is not first)

    def _may_start(self, sequence: Sequence) -> bool:
        """Announce it, unless it had better wait for a prefix that is fetched or computed."""
        return not self._is_fetching(sequence) and self._leases.announce(sequence)

    def _claim(self, lacks_blocks: bool) -> None:
        for sequence in self._waiting.claimants() if lacks_blocks else ():
            if self._may_start(sequence):
                self._leases.claim_for(sequence)
                self._leases.withdraw(sequence)
                return
        self._leases.claim_for(None)

    def _is_fetching(self, sequence: Sequence) -> bool:
        hint = sequence.kv
        if not isinstance(hint, PrefixHint) or hint.fetch is None or hint.fetcher is None:
            return False
        return hint.fetcher.is_coming(hint.fetch)

    def next_timeout(self) -> float:
        """When the first of those that wait must be looked at again, in monotonic seconds; infinity if nobody must."""
        soonest = float("inf")
        if self._interactive:
            soonest = min(map(self._timeouts.end_of_waiting, self._waiting), default=NEVER).at
        if self._leases.num_fetching:
            hints = (sequence.kv for sequence in self._waiting)
            fetches = (hint.fetch for hint in hints if isinstance(hint, PrefixHint) and hint.fetch is not None)
            # Who was late already when there was no room waits for room.
            ends = (fetch.deadline for fetch in fetches if fetch.deadline > self._looked_at)
            soonest = min(soonest, min(ends, default=soonest))
        return soonest

    def take_lines(self, is_copied: Callable[[Request], bool]) -> list[Sequence]:
        """Remove, as cancelled, the lines of files: another run can compute them. Copies, which end alike, stay."""
        lines = [
            sequence
            for sequence in self._waiting
            if sequence.request.src is not None and sequence.request.src.fingerprint and not is_copied(sequence.request)
        ]
        for sequence in lines:
            sequence.request.cancelled = True
            end_unstarted(sequence, FinishReason.CANCELLED, self._clock())
        self._remove(lines)
        return lines

    def take_ended(self) -> list[Sequence]:
        """Remove and finish what was cancelled or has waited too long."""
        ended = [sequence for sequence in self._waiting if sequence.request.cancelled]
        for sequence in ended:
            end_unstarted(sequence, FinishReason.CANCELLED, self._clock())
        if self._interactive:
            now = self._clock()
            for sequence in self._waiting:
                end = self._timeouts.end_of_waiting(sequence)
                if end.at <= now and not sequence.ended:
                    end_unstarted(sequence, end.reason, now)
                    ended.append(sequence)
        if ended:
            self._remove(ended)
        return ended
