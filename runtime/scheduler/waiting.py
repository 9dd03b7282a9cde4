"""The waiting queue: sequences that have no lease yet, and how long they may wait for one."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ...records import Choice, FinishReason, Sequence
from .lease import Claim, LeaseBook, PrefixHint
from .timeouts import NEVER

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...records import Request
    from .handover import PairedLeases
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
        claim = self._leases.claim if isinstance(self._leases, LeaseBook) else None
        if claim is not None and any(sequence is claim.sequence for sequence in sequences):
            self._claim_for(None)

    def clear(self) -> None:
        """Forget everybody: whoever queued them answers for them."""
        self._remove([*self._waiting])

    def take_granted(self) -> list[Sequence]:
        """Grant leases in the policy's order until one does not fit; the granted carry their lease in `kv`.

        That one claims KV blocks if it lacks nothing else and the policy lets it. Where prompts are computed by other
        workers than decode them nobody claims any.
        """
        leases = self._leases
        self._looked_at = self._clock()
        slots, blocks = leases.room()
        candidates: list[Sequence] = []
        for sequence in self._waiting.in_order() if slots else ():
            if sequence.sampling.n > slots or (blocks <= 0 and (candidates or not self._waiting.may_claim(sequence))):
                break
            if not self._is_fetching(sequence) and leases.announce(sequence):
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
        self._claim_for(candidates[len(granted)] if len(granted) < len(candidates) else None)
        return granted

    def _claim_for(self, sequence: Sequence | None) -> None:
        leases = self._leases
        if not isinstance(leases, LeaseBook):
            return
        if sequence is None or not leases.policy.may_claim(sequence):
            leases.claim = None
            return
        blocks, claim = leases.estimate_blocks(sequence), leases.claim
        if claim is not None and claim.sequence is sequence:
            # Room that was not enough: the cache spares it less than was estimated.
            blocks = leases.lease_blocks(sequence) if claim.has_room else claim.blocks
        leases.claim = Claim(sequence, leases.policy.rank(sequence), blocks)

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
