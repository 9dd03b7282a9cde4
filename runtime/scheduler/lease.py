"""Leases: the right to run. A sequence holds one from `schedule` to its end; the sum of leases is the backpressure.

A lease is a slot for each choice and KV blocks for the whole prompt. It is granted on the flow's thread, used and given
back by the worker's.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from ...errors import RequestError
from ...records import Pooling

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy as np
    from numpy.typing import NDArray

    from ...kv_runtime.cache import Acquired, KVCache, Want
    from ...kv_runtime.pool import Int32Array
    from ...kv_runtime.tiers import Fetch, Fetcher, KVTiers
    from ...records import Request, Sequence
    from .handover import Handover
    from .policies import Policy

Namespace = tuple[str, str]
Rank = tuple[float, ...]
PrefixKey = tuple[Namespace, bytes]  # and the first block's tokens


def namespace_of(sequence: Sequence) -> Namespace:
    """Who may share KV with this sequence."""
    return (sequence.request.tenant, sequence.request.cache_salt)


class BlockCopy(NamedTuple):
    """A partly filled block that is shared up to a token: it is copied before its first own token is written."""

    source: int
    target: int


@dataclass(slots=True, eq=False)
class Lease:
    """What a sequence was granted. `blocks` covers the prompt; the first `hit_tokens` tokens are computed already."""

    slots: list[int]
    blocks: NDArray[np.int32]
    hit_tokens: int
    copy: BlockCopy | None
    fork_blocks: NDArray[np.int32]  # one for each further choice whose prompt ends inside a block
    worker: int  # whose slots and blocks these are: its place among the workers of its kind
    generation: int  # of the KV cache, when it was granted: hits of an earlier one are lost
    commit_outputs: bool = False
    prefix_key: PrefixKey | None = None
    handover: Handover | None = None  # where the prompt's KV goes once it is computed; None: it stays


@dataclass(slots=True, eq=False)
class Claim:
    """KV blocks for a sequence that waits, one of `Policy.claimants`: rows whose rank has a larger first place give way
    to it.

    Made by the flow's thread and met by the worker, which sets `has_room`. Where a prompt needs blocks of two workers
    there are two claims; `beyond` is the other one, of the worker that decodes.
    """

    sequence: Sequence
    rank: Rank
    blocks: int  # that must be free
    kv: KVCache  # where
    beyond: Claim | None = None
    has_room: bool = False
    has_none_behind: bool = False  # no row of that worker is left that gives way

    @property
    def lacks_rows(self) -> bool:
        """Whether blocks are lacking that only rows which are not on that worker yet can give way."""
        return self.has_none_behind and self.kv.available() < self.blocks


@dataclass(slots=True)
class PrefixHint:
    """Left by kv_lookup on a sequence: it may reuse cached prefixes, and how much there was at the time."""

    tokens: int
    prefix_key: PrefixKey | None = None  # under which its prompt is announced
    fetch: Fetch | None = None  # for what lower tiers have of it
    fetcher: Fetcher | None = None  # that brings it up


@dataclass(slots=True)
class LeaseBook:
    """Grants and takes back the leases of one worker. All methods may be called from any thread, but `grant` from the
    policy's."""

    kv: KVCache
    num_slots: int
    block_size: int
    policy: Policy
    worker: int = 0
    paused: bool = False  # set by the worker while preempted rows wait for blocks: they come first
    claim: Claim | None = None  # once there is room it passes, paused or not
    tiers: KVTiers | None = None  # below the pool
    _free: list[int] = field(init=False)
    _lock: Lock = field(default_factory=Lock)
    _computing: dict[PrefixKey, list[Sequence]] = field(default_factory=dict)
    _in_transit: dict[int, tuple[Sequence, Lease]] = field(default_factory=dict)  # by id of the request
    load: int = 0  # tokens of prompts that have a lease and are not computed, or not let go
    _to_compute: dict[int, int] = field(default_factory=dict)  # the same by id of the lease
    _changing: int = 0  # calls under way that hold blocks which `_in_transit` does not show

    def __post_init__(self) -> None:
        self._free = list(range(self.num_slots - 1, -1, -1))

    @property
    def free_slots(self) -> int:
        return len(self._free)

    def room(self) -> tuple[int, int]:
        """Slots and blocks that could be granted now."""
        return len(self._free), self.kv.available()

    def count_cached(self, prompts: Iterable[tuple[Int32Array, Namespace]], *, touch: bool = True) -> list[int]:
        """How many tokens of each prompt a lease would find computed; see `KVCache.count_cached`."""
        return self.kv.count_cached(prompts, touch=touch)

    def check_fits(self, sequence: Sequence) -> None:
        """Refuse what could never run.

        Raises:
            RequestError: more choices than slots, or more tokens than the whole KV pool.
        """
        sampling = sequence.sampling
        most = min(self.num_slots, self.policy.max_slots)
        if sampling.n > most:
            raise RequestError(f"n={sampling.n} is more than scheduler.max_batch_size={most:g}")
        blocks = self.max_blocks(sequence)
        if blocks > self.kv.num_blocks:
            raise RequestError(
                f"prompt of {len(sequence.prompt_tokens)} tokens + max_new_tokens {sampling.max_new_tokens} needs "
                f"{blocks} KV blocks, the pool has {self.kv.num_blocks}: shorten it or raise kv_cache.max_tokens"
            )

    def max_outputs(self, sequence: Sequence, num_blocks: int) -> int:
        """How many tokens an output may have, going on alone in so many blocks."""
        return (num_blocks - sequence.sampling.n + 1) * self.block_size - len(sequence.prompt_tokens)

    def max_blocks(self, sequence: Sequence) -> int:
        """How many blocks it may come to need in order to go on alone."""
        tokens = len(sequence.prompt_tokens) + sequence.sampling.max_new_tokens
        # Each further choice may hold one partly filled block while the first one runs.
        return -(-tokens // self.block_size) + sequence.sampling.n - 1

    def estimate_blocks(self, sequence: Sequence) -> int:
        """How many blocks a lease may take out of the pool: exact if the cache is as kv_lookup found it."""
        cached = sequence.kv.tokens if may_reuse(sequence) else 0
        return self.prompt_blocks(sequence) - cached // self.block_size

    def lease_blocks(self, sequence: Sequence) -> int:
        """How many blocks a lease takes at most."""
        forks = sequence.sampling.n - 1 if len(sequence.prompt_tokens) % self.block_size else 0
        return self.prompt_blocks(sequence) + forks

    def prompt_blocks(self, sequence: Sequence) -> int:
        """How many blocks the prompt fills, cached ones included."""
        return -(-len(sequence.prompt_tokens) // self.block_size)

    def announce(self, sequence: Sequence) -> bool:
        """Note that a prompt is about to be computed, so that others can wait for the prefix that they share.

        False, and nothing is noted, if this one had better wait: a prompt that was announced before shares at least
        one more block with it than the cache holds by now.
        """
        hint, prompt = sequence.kv, sequence.prompt_tokens
        if not may_reuse(sequence) or len(prompt) <= self.block_size:
            return True
        namespace = namespace_of(sequence)
        key = (namespace, prompt[: self.block_size].tobytes())
        with self._lock:
            others = self._computing.setdefault(key, [])
            if others:
                (cached,) = self.kv.count_cached([(prompt, namespace)], touch=False)
                end = cached + self.block_size
                if end < len(prompt) and any(_share(other.prompt_tokens, prompt, cached, end) for other in others):
                    return False
            others.append(sequence)
        hint.prefix_key = key
        return True

    @property
    def num_fetching(self) -> int:
        """Blocks on their way up from lower tiers."""
        return self.tiers.fetcher.num_coming if self.tiers is not None else 0

    def look_below(self, sequence: Sequence) -> None:
        """Note on the sequence what lower tiers could bring up of its prompt."""
        if self.tiers is not None:
            prompt, hint = sequence.prompt_tokens, sequence.kv
            hint.fetch = self.tiers.wish(prompt, namespace_of(sequence), len(prompt) - 1)
            hint.fetcher = self.tiers.fetcher

    def foreseen_hit(self, sequence: Sequence) -> int:
        """How many tokens of a prompt are cached, or will be once those that were announced are computed."""
        from ...kv_runtime.node import common_prefix_length

        if not may_reuse(sequence):
            return 0
        prompt, namespace = sequence.prompt_tokens, namespace_of(sequence)
        (cached,) = self.kv.count_cached([(prompt, namespace)], touch=False)
        with self._lock:
            others = [*self._computing.get((namespace, prompt[: self.block_size].tobytes()), ())]
        longer = [other.prompt_tokens for other in others if _share(other.prompt_tokens, prompt, cached, cached + 1)]
        return max([cached, *(common_prefix_length(other, prompt) for other in longer)])

    def grant(self, sequences: list[Sequence]) -> list[Lease]:
        """Give slots and blocks to as many of the sequences, from the first on, as there are enough for.

        While paused, only to the first, if the claim is its own and there is room. The others are no longer announced.
        """
        slots: list[list[int]] = []
        with self._lock:
            for sequence in sequences if not self.paused else self._claimed(sequences):
                count = sequence.sampling.n
                if len(self._free) < count:
                    break
                slots.append([self._free.pop() for _ in range(count)])
        with self._change():
            generation = self.kv.generation  # before: what is lost meanwhile is no hit
            acquired = self.kv.acquire(self._wants(sequences[: len(slots)]))
            leases = [
                self._make_lease(*granted, generation) for granted in zip(sequences, slots, acquired, strict=False)
            ]
        for unused in slots[len(leases) :]:
            self.give_back_slots(unused)
        for sequence in sequences[len(leases) :]:
            self.withdraw(sequence)
        return leases

    def _claimed(self, sequences: list[Sequence]) -> list[Sequence]:
        return sequences[:1] if sequences and sequences[0] is self.has_room_for else []

    @property
    def claimant(self) -> Sequence | None:
        """Whose claim there is."""
        return self.claim.sequence if self.claim is not None else None

    @property
    def has_room_for(self) -> Sequence | None:
        """Whose claim has been met."""
        return self.claim.sequence if self.claim is not None and self.claim.has_room else None

    def claim_for(self, sequence: Sequence | None, beyond: Claim | None = None) -> None:
        """Have room made for one that waits, and has been announced; with None for nobody."""
        if sequence is None:
            self.claim = None
            return
        blocks, claim = self.estimate_blocks(sequence), self.claim
        if claim is not None and claim.sequence is sequence:
            # Room that was not enough: the cache spares it less than was estimated.
            blocks = self.lease_blocks(sequence) if claim.has_room else claim.blocks
        self.claim = Claim(sequence, self.policy.rank(sequence), blocks, self.kv, beyond)

    def withdraw(self, sequence: Sequence) -> None:
        """What `announce` noted does not come about for now."""
        if isinstance(sequence.kv, PrefixHint):
            self._retract(sequence, sequence.kv)

    def _wants(self, sequences: list[Sequence]) -> list[Want]:
        from ...kv_runtime.cache import Want

        wants = []
        for sequence in sequences:
            length = len(sequence.prompt_tokens)
            limit = length - 1 if may_reuse(sequence) else 0
            forks = sequence.sampling.n - 1 if length % self.block_size else 0
            wants.append(Want(sequence.prompt_tokens, namespace_of(sequence), limit, forks))
        return wants

    def _make_lease(self, sequence: Sequence, slots: list[int], acquired: Acquired, generation: int) -> Lease:
        lease = self._lay_out(sequence, slots, acquired, generation)
        if isinstance(sequence.kv, PrefixHint):
            lease.prefix_key = sequence.kv.prefix_key
            if len(sequence.prompt_tokens) - lease.hit_tokens <= self.block_size:
                self._retract(sequence, lease)
        self.policy.charge(sequence)
        self._to_compute[id(lease)] = tokens = len(sequence.prompt_tokens) - lease.hit_tokens
        with self._lock:
            self.load += tokens
        self._in_transit[id(sequence.request)] = (sequence, lease)
        return lease

    def _lay_out(self, sequence: Sequence, slots: list[int], acquired: Acquired, generation: int) -> Lease:
        import numpy as np

        size, length = self.block_size, len(sequence.prompt_tokens)
        (hit, shared), fresh = acquired
        full = hit // size
        own = -(-length // size) - full
        copy = BlockCopy(int(shared[full]), int(fresh[0])) if hit % size else None
        blocks = np.concatenate([shared[:full], fresh[:own]]) if full else fresh[:own]
        return Lease(slots, blocks, hit, copy, fresh[own:], self.worker, generation)

    def commit(self, sequences: list[Sequence]) -> None:
        """Make the KV of prompts that were computed reusable; their leases are in `sequence.kv`."""
        self._commit((sequence, sequence.kv) for sequence in sequences)
        for sequence in sequences:
            self.prefix_computed(sequence, sequence.kv)

    def _commit(self, computed: Iterable[tuple[Sequence, Lease]]) -> None:
        from ...kv_runtime.cache import Commit

        self.kv.commit_all(
            [
                Commit(
                    sequence.prompt_tokens,
                    lease.blocks,
                    namespace_of(sequence),
                    lease.generation,
                    sequence.request.pin,
                )
                for sequence, lease in computed
            ]
        )

    def prefix_computed(self, sequence: Sequence, lease: Lease) -> None:
        """The prompt's KV is in the tree, or never will be: nobody needs to wait for it."""
        self._retract(sequence, lease)

    def _retract(self, sequence: Sequence, announced: Lease | PrefixHint) -> None:
        if announced.prefix_key is None:
            return
        with self._lock:
            key, announced.prefix_key = announced.prefix_key, None
            if key is not None:
                others = self._computing[key]
                others.remove(sequence)
                if not others:
                    del self._computing[key]

    def arrive(self, sequence: Sequence) -> bool:
        """The worker has the sequence: from here on it gives the lease back. False if it was reclaimed on the way."""
        return self._in_transit.pop(id(sequence.request), None) is not None

    @property
    def any_in_transit(self) -> bool:
        """Whether blocks belong to a lease whose sequence has not reached the worker, or never will, or to a copy."""
        return bool(self._in_transit or self._changing or (self.tiers is not None and self.tiers.num_held))

    @contextmanager
    def _change(self) -> Iterator[None]:
        with self._lock:
            self._changing += 1
        try:
            yield
        finally:
            with self._lock:
                self._changing -= 1

    def reclaim(self, request: Request) -> bool:
        """Take back the lease of a request that ended on its way to the worker; False if there is none."""
        if id(request) not in self._in_transit:
            return False
        with self._change():
            held = self._in_transit.pop(id(request), None)
            if held is not None:
                self.give_back_unused(*held)
        return held is not None

    def end(self, sequence: Sequence, lease: Lease) -> None:
        """The last row of a sequence has ended; its slots and blocks were given back row by row."""
        self.let_go(sequence, lease)
        self.policy.settle(sequence, used=True)
        if lease.handover is not None:
            lease.handover.give_back(sequence)

    def let_go(self, sequence: Sequence, lease: Lease) -> None:
        """The worker has no more to do with it: it has ended, or another worker goes on with it."""
        self.prefix_computed(sequence, lease)
        with self._lock:
            self.load -= self._to_compute.pop(id(lease), 0)

    def give_back_slots(self, slots: list[int]) -> None:
        """Rows ended."""
        with self._lock:
            self._free += slots

    def give_back_unused(self, sequence: Sequence, lease: Lease) -> None:
        """Return a lease that the worker never used."""
        self.let_go(sequence, lease)
        self.policy.settle(sequence, used=False)
        self._free_all(lease)
        if lease.handover is not None:
            lease.handover.give_back(sequence)

    def _free_all(self, lease: Lease) -> None:
        self.kv.release(lease.blocks)
        self.kv.release(lease.fork_blocks)
        if lease.copy is not None:
            import numpy as np

            self.kv.release(np.array([lease.copy.source], np.int32))
        with self._lock:
            self._free.extend(lease.slots)


def may_reuse(sequence: Sequence) -> bool:
    """Whether cached prefixes serve it: kv_lookup has seen it, and not every position must be computed."""
    return isinstance(sequence.kv, PrefixHint) and not needs_every_position(sequence)


def needs_every_position(sequence: Sequence) -> bool:
    """Whether it asks for something of all prompt positions, of which the cache keeps nothing but KV."""
    return sequence.sampling.prompt_logprobs is not None or sequence.request.pooling is Pooling.MEAN


def _share(one: Int32Array, other: Int32Array, start: int, end: int) -> bool:
    """Whether two prompts have their first `end` tokens in common; those from `start` on are most likely to differ."""
    tail = one[start:end].tobytes()
    return len(one) >= end and tail == other[start:end].tobytes() and one[:start].tobytes() == other[:start].tobytes()
