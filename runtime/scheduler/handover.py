"""Handover: a prompt is computed on one worker and decoded on another. Leases for both are granted together.

So the KV's way is free before the first layer is computed, and nothing that runs can wait for room on the other side:
a prompt has KV blocks on both sides or, preempted, on neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ...kv_runtime.pool import NO_BLOCKS
from .lease import Claim, LeaseBook
from .plan import KVExport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from ...kv_runtime.cache import Acquired, KVCache
    from ...kv_runtime.pool import Int32Array
    from ...records import Request, Sequence
    from .lease import Lease, Namespace
    from .policies import Policy


class DecodeLeases(LeaseBook):
    """Leases on a worker that decodes. From the grant on they wait, in transit, for the prompt's KV.

    They reuse whole cached blocks only, and cost their tenant nothing: the lease for the prompt has been charged.
    """

    _left: set[int]
    on_freed: Callable[[], None]  # blocks of leases in transit, or of a copy, are free; from any thread

    def __post_init__(self) -> None:
        super().__post_init__()
        self._left = set()  # of those in transit, by id of the request, the ones that no other worker has any more
        self.on_freed = lambda: None

    def _make_lease(self, sequence: Sequence, slots: list[int], acquired: Acquired, generation: int) -> Lease:
        lease = self._lay_out(sequence, slots, acquired, generation)
        if lease.copy is not None:
            self.kv.release(np.array([lease.copy.source], np.int32))
            lease.hit_tokens -= lease.hit_tokens % self.block_size
            lease.copy = None
        self._in_transit[id(sequence.request)] = (sequence, lease)
        return lease

    def give_up_blocks(self, lease: Lease) -> None:
        """A lease in transit keeps its slots only."""
        with self._change():
            freed = self.kv.release(lease.blocks) + self.kv.release(lease.fork_blocks)
            lease.blocks = lease.fork_blocks = NO_BLOCKS
            lease.hit_tokens = 0
        if freed:
            self.on_freed()

    def take_blocks(self, sequence: Sequence, lease: Lease) -> bool:
        """Give a lease the blocks again that it gave up; False if there are too few. It comes before rows that were
        preempted here: these may wait for a claim, and the claim for it."""
        with self._change():
            generation = self.kv.generation
            acquired = self.kv.acquire(self._wants([sequence]))
            if not acquired:
                return False
            again = self._lay_out(sequence, lease.slots, acquired[0], generation)
            lease.blocks, lease.fork_blocks, lease.generation = again.blocks, again.fork_blocks, generation
        return True

    def withdraw(self, sequence: Sequence) -> None:
        """Nothing is announced here."""

    def expect(self, request: Request) -> None:
        """The prompt's worker lets the request go: its lease here is all it has."""
        self._left.add(id(request))

    def arrive(self, sequence: Sequence) -> bool:
        self._left.discard(id(sequence.request))
        return super().arrive(sequence)

    def reclaim(self, request: Request) -> bool:
        held = self._in_transit.get(id(request)) if id(request) in self._left else None
        if held is None or not super().reclaim(request):
            return False
        self._left.discard(id(request))
        self.policy.settle(held[0], used=True)  # the prompt was computed, and nobody else settles it
        self.on_freed()
        return True

    def take_back(self, request: Request) -> bool:
        """The prompt's worker takes back the lease of a request that it has not let go; False if there is none."""
        self._left.discard(id(request))
        return super().reclaim(request)

    def give_back_unused(self, sequence: Sequence, lease: Lease) -> None:
        self._free_all(lease)

    def begin_copy(self, kv: KVCache, source: NDArray[np.int32], target: NDArray[np.int32]) -> Callable[[], None]:
        """Blocks of `kv` are to be copied to blocks of this pool: all are kept until what is returned is called."""
        with self._lock:
            self._changing += 1
        kv.retain(source)
        self.kv.retain(target)
        if self.tiers is not None:
            self.tiers.flush(wait=True)  # what lay in the target blocks before
        return partial(self._end_copy, kv, source, target)

    def _end_copy(self, kv: KVCache, source: NDArray[np.int32], target: NDArray[np.int32]) -> None:
        freed = kv.release(source) + self.kv.release(target)
        with self._lock:
            self._changing -= 1
        if freed:  # whoever had them has ended meanwhile
            self.on_freed()

    def commit_arrived(self, sequences: list[Sequence]) -> None:
        """Make the KV of prompts that has arrived here reusable; `sequence.kv` is the other worker's lease."""
        handovers = ((sequence, sequence.kv.handover) for sequence in sequences)
        self._commit((sequence, handover.lease) for sequence, handover in handovers if handover.has_arrived(sequence))


@dataclass(slots=True, eq=False)
class Handover:
    """The other half of a prompt's lease: where its KV goes, and how far it has got.

    `sent` counts the tokens whose export is planned, or that the other side has cached. With an `error` nothing more is
    sent and the other side computes the prompt itself.
    """

    book: DecodeLeases
    lease: Lease
    sent: int
    error: str | None = None

    def export(self, slot: int, epoch: int, kv: KVCache, blocks: NDArray[np.int32], end: int) -> KVExport:
        """Plan to send what is computed up to token `end` and not sent yet; `blocks` are the row's, in pool `kv`."""
        size = self.book.block_size
        part = slice(self.sent // size, -(-end // size))
        source, target = blocks[part].copy(), self.lease.blocks[part].copy()
        done = self.book.begin_copy(kv, source, target)
        start, self.sent = self.sent, end
        return KVExport(slot, epoch, self.book.worker, start, end, source, target, done)

    def give_way(self) -> None:
        """The prompt lost its KV blocks: those that it was to fill on the other side are free again as well."""
        self.sent, self.error = 0, None
        self.book.give_up_blocks(self.lease)

    def come_back(self, sequence: Sequence) -> bool:
        """Take blocks on the other side again; False if there are too few."""
        return self.book.take_blocks(sequence, self.lease)

    def has_arrived(self, sequence: Sequence) -> bool:
        """Whether the whole prompt's KV lies in the lease's blocks."""
        whole = self.error is None and self.sent == len(sequence.prompt_tokens)
        return whole and self.lease.generation == self.book.kv.generation

    def give_back(self, sequence: Sequence) -> None:
        """The sequence ended before it was handed over."""
        if self.book.take_back(sequence.request):
            self.book.on_freed()


class PairedLeases:
    """Grants a lease on a prefill worker together with one on a decode worker, which is its `handover`.

    The prompt goes where most of it is cached or being computed and least waits; its decoding, where most blocks are
    free. One that is only pooled gets no second lease. The interface is that of a `LeaseBook`.
    """

    def __init__(self, prefill: list[LeaseBook], decode: list[DecodeLeases]) -> None:
        self.policy: Policy = prefill[0].policy
        self.prefill = prefill
        self.decode = decode
        self._all: list[LeaseBook] = [*prefill, *decode]
        self._routes: dict[int, tuple[LeaseBook, int]] = {}  # and tokens to compute, by id of those announced
        self._announced = [0] * len(prefill)  # the same tokens, by worker

    @classmethod
    def over(
        cls, kvs: list[KVCache], prefill_workers: int, slots: int, block_size: int, policy: Policy
    ) -> PairedLeases:
        """The books of as many workers as there are KV caches, those of the prefill workers first."""
        prefill = [LeaseBook(kv, slots, block_size, policy, at) for at, kv in enumerate(kvs[:prefill_workers])]
        decode = [DecodeLeases(kv, slots, block_size, policy, at) for at, kv in enumerate(kvs[prefill_workers:])]
        return cls(prefill, decode)

    @property
    def num_slots(self) -> int:
        return sum(book.num_slots for book in self._all)

    @property
    def free_slots(self) -> int:
        return sum(book.free_slots for book in self._all)

    @property
    def any_in_transit(self) -> bool:
        return any(book.any_in_transit for book in self._all)

    @property
    def num_fetching(self) -> int:
        """Blocks on their way up from lower tiers."""
        return sum(book.num_fetching for book in self.prefill)

    @property
    def claimant(self) -> Sequence | None:
        """See `LeaseBook.claimant`."""
        return next((book.claimant for book in self.prefill if book.claim is not None), None)

    @property
    def has_room_for(self) -> Sequence | None:
        """Whose claims have been met, on both sides."""
        claims = [book.claim for book in self._all if book.claim is not None]
        return claims[0].sequence if claims and all(claim.has_room for claim in claims) else None

    def claim_for(self, sequence: Sequence | None) -> None:
        """Have room made on both sides; see `LeaseBook.claim_for`."""
        if sequence is None:
            for book in self._all:
                book.claim = None
            return
        route = self._routes[id(sequence)][0]
        target = self._targets(sequence)[0] if sequence.request.pooling is None else None  # nothing is decoded
        for book in self._all:
            if book is not route and book is not target:
                book.claim = None
        if target is not None:
            target.claim = Claim(sequence, self.policy.rank(sequence), target.lease_blocks(sequence), target.kv)
        route.claim_for(sequence, None if target is None else target.claim)

    def _targets(self, sequence: Sequence) -> list[DecodeLeases]:
        """Where it could be decoded: first where it has a claim, then where most blocks are free."""
        return sorted(self.decode, key=lambda book: (book.claimant is sequence, book.room()[1]), reverse=True)

    def withdraw(self, sequence: Sequence) -> None:
        """See `LeaseBook.withdraw`."""
        book, tokens = self._routes.pop(id(sequence))
        self._announced[book.worker] -= tokens
        book.withdraw(sequence)

    def look_below(self, sequence: Sequence) -> None:
        """Note on the sequence what lower tiers could bring up, at the prefill worker that then has most of it."""
        first, *others = self.prefill
        first.look_below(sequence)
        hint = sequence.kv
        below = [book.tiers for book in self.prefill if book.tiers is not None]
        if others and below:
            best = max(below, key=lambda tiers: tiers.fetcher.count_held(hint.fetch))  # of equals the first
            if best is not below[0]:
                best.note(hint.fetch)
                hint.fetcher = best.fetcher

    def room(self) -> tuple[int, int]:
        """Slots and blocks that could be granted now, at most."""
        sides = [[book.room() for book in side] for side in (self.prefill, self.decode)]
        slots, blocks = (min(sum(room[kind] for room in side) for side in sides) for kind in (0, 1))
        return slots, blocks

    def check_fits(self, sequence: Sequence) -> None:
        """See `LeaseBook.check_fits`."""
        self.decode[0].check_fits(sequence)

    def max_outputs(self, sequence: Sequence, num_blocks: int) -> int:
        """See `LeaseBook.max_outputs`."""
        return self.decode[0].max_outputs(sequence, num_blocks)

    def max_blocks(self, sequence: Sequence) -> int:
        """See `LeaseBook.max_blocks`."""
        return self.decode[0].max_blocks(sequence)

    def estimate_blocks(self, sequence: Sequence) -> int:
        """See `LeaseBook.estimate_blocks`."""
        return self.prefill[0].estimate_blocks(sequence)

    def prompt_blocks(self, sequence: Sequence) -> int:
        """See `LeaseBook.prompt_blocks`."""
        return self.prefill[0].prompt_blocks(sequence)

    def count_cached(self, prompts: Iterable[tuple[Int32Array, Namespace]], *, touch: bool = True) -> list[int]:
        """How many tokens of each prompt the prefill worker that has most of it has cached."""
        prompts = [*prompts]
        counts = [book.count_cached(prompts, touch=touch) for book in self.prefill]
        return [max(of_one) for of_one in zip(*counts, strict=True)]

    def announce(self, sequence: Sequence) -> bool:
        """Choose the prompt's worker; see `LeaseBook.announce`."""
        book, tokens = self._route(sequence)
        announced = book.announce(sequence)
        if announced:
            self._routes[id(sequence)] = book, tokens
            self._announced[book.worker] += tokens
        return announced

    def _route(self, sequence: Sequence) -> tuple[LeaseBook, int]:
        """Where the prompt is computed soonest, and how many tokens that is."""
        claimed = [book for book in self.prefill if book.claimant is sequence]
        if claimed or len(self.prefill) == 1:
            return (claimed or self.prefill)[0], 0
        load = [book.load + announced for book, announced in zip(self.prefill, self._announced, strict=True)]
        own = {book.worker: len(sequence.prompt_tokens) - book.foreseen_hit(sequence) for book in self.prefill}
        best = min(self.prefill, key=lambda book: load[book.worker] + own[book.worker])
        return best, own[best.worker]

    def grant(self, sequences: list[Sequence]) -> list[Lease]:
        """Give both leases to as many of the announced sequences, from the first on, as there is room for on both
        sides; the others are no longer announced."""
        routes = [self._routes.pop(id(sequence))[0] for sequence in sequences]
        self._announced = [0] * len(self.prefill)
        leases: list[Lease] = []
        for sequence, route in zip(sequences, routes, strict=True):
            lease = self._grant_pair(sequence, route)
            if lease is None:
                break
            leases.append(lease)
        for sequence, route in zip(sequences[len(leases) :], routes[len(leases) :], strict=True):
            route.withdraw(sequence)
        return leases

    def _grant_pair(self, sequence: Sequence, route: LeaseBook) -> Lease | None:
        if sequence.request.pooling is not None:  # nothing is decoded
            return next(iter(route.grant([sequence])), None)
        for book in self._targets(sequence):
            if target := book.grant([sequence]):
                break
        else:
            return None
        granted = route.grant([sequence])
        if not granted:
            book.take_back(sequence.request)
            return None
        granted[0].handover = Handover(book, target[0], target[0].hit_tokens)
        return granted[0]

    def commit(self, sequences: list[Sequence]) -> None:
        """Make the KV of prompts that were computed reusable, on both sides."""
        for book in self.prefill:
            book.commit([sequence for sequence in sequences if sequence.kv.worker == book.worker])
        for target in self.decode:
            target.commit_arrived(
                [
                    sequence
                    for sequence in sequences
                    if sequence.kv.handover is not None and sequence.kv.handover.book is target
                ]
            )

    def prefix_computed(self, sequence: Sequence, lease: Lease) -> None:
        """See `LeaseBook.prefix_computed`."""
        self.prefill[lease.worker].prefix_computed(sequence, lease)

    def reclaim(self, request: Request) -> bool:
        """Take back the leases of a request that ended on its way to a worker; False if it was on no such way."""
        return any(book.reclaim(request) for book in self._all)
