"""Leases: the right to run. A sequence holds one from `schedule` to its end; the sum of leases is the backpressure.

A lease is a slot for each choice and KV blocks for the whole prompt. It is granted on the flow's thread, used and given
back by the worker's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from ...errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ...kv_runtime.cache import KVCache
    from ...records import Request, Sequence

Namespace = tuple[str, str]


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
    commit_outputs: bool = False
    prefix_key: tuple[Namespace, bytes] | None = None


@dataclass(slots=True)
class PrefixHint:
    """Left by kv_lookup on a sequence: it may reuse cached prefixes, and how much there was at the time."""

    tokens: int


@dataclass(slots=True)
class LeaseBook:
    """Grants and takes back leases. All methods may be called from any thread."""

    kv: KVCache
    num_slots: int
    block_size: int
    paused: bool = False  # set by the worker while preempted rows wait for blocks: they come first
    _free: list[int] = field(init=False)
    _lock: Lock = field(default_factory=Lock)
    _computing: dict[tuple[Namespace, bytes], list[Sequence]] = field(default_factory=dict)
    _in_transit: dict[int, tuple[Sequence, Lease]] = field(default_factory=dict)  # by id of the request

    def __post_init__(self) -> None:
        self._free = list(range(self.num_slots - 1, -1, -1))

    @property
    def free_slots(self) -> int:
        return len(self._free)

    def check_fits(self, sequence: Sequence) -> None:
        """Refuse what could never run.

        Raises:
            RequestError: more choices than slots, or more tokens than the whole KV pool.
        """
        sampling = sequence.sampling
        if sampling.n > self.num_slots:
            raise RequestError(f"n={sampling.n} is more than scheduler.max_batch_size={self.num_slots}")
        tokens = len(sequence.prompt_tokens) + sampling.max_new_tokens
        # Each further choice may hold one partly filled block while the first one runs.
        blocks = -(-tokens // self.block_size) + sampling.n - 1
        if blocks > self.kv.num_blocks:
            raise RequestError(
                f"prompt of {len(sequence.prompt_tokens)} tokens + max_new_tokens {sampling.max_new_tokens} needs "
                f"{blocks} KV blocks, the pool has {self.kv.num_blocks}: shorten it or raise kv_cache.max_tokens"
            )

    def grant(self, sequence: Sequence) -> Lease | None:
        """Give slots and blocks, or None while there are too few."""
        prompt, count = sequence.prompt_tokens, sequence.sampling.n
        with self._lock:
            if self.paused or len(self._free) < count:
                return None
            slots = [self._free.pop() for _ in range(count)]
        reuse = isinstance(sequence.kv, PrefixHint) and sequence.sampling.prompt_logprobs is None
        granted = self._take_blocks(sequence, prompt, reuse)
        if granted is None:
            with self._lock:
                self._free.extend(slots)
            return None
        blocks, hit, copy, fork_blocks = granted
        lease = Lease(slots, blocks, hit, copy, fork_blocks)
        self._in_transit[id(sequence.request)] = (sequence, lease)
        if reuse and len(prompt) - hit > self.block_size:
            lease.prefix_key = self._prefix_key(sequence)
            with self._lock:
                self._computing.setdefault(lease.prefix_key, []).append(sequence)
        return lease

    def _take_blocks(
        self, sequence: Sequence, prompt: NDArray[np.int32], reuse: bool
    ) -> tuple[NDArray[np.int32], int, BlockCopy | None, NDArray[np.int32]] | None:
        size = self.block_size
        import numpy as np

        shared = np.empty(0, np.int32)
        hit = 0
        if reuse:
            match = self.kv.match(prompt, namespace_of(sequence), limit=len(prompt) - 1, record=True)
            shared, hit = match.blocks, match.tokens
        full = hit // size
        own = -(-len(prompt) // size) - full
        forks = sequence.sampling.n - 1 if len(prompt) % size else 0
        fresh = self.kv.allocate(own + forks)
        if fresh is None:
            self.kv.release(shared)
            return None
        copy = BlockCopy(int(shared[full]), int(fresh[0])) if hit % size else None
        blocks = np.concatenate([shared[:full], fresh[:own]]) if full else fresh[:own]
        return blocks, hit, copy, fresh[own:]

    def _prefix_key(self, sequence: Sequence) -> tuple[Namespace, bytes]:
        return namespace_of(sequence), sequence.prompt_tokens[: self.block_size].tobytes()

    def is_prefix_being_computed(self, sequence: Sequence) -> bool:
        """Whether a running prompt shares at least one more block with this one than the cache holds by now."""
        if not self._computing or not isinstance(sequence.kv, PrefixHint):
            return False
        others = self._computing.get(self._prefix_key(sequence))
        if not others:
            return False
        prompt = sequence.prompt_tokens
        shared = max(common_prefix(prompt, other.prompt_tokens) for other in list(others))
        if shared < self.block_size:
            return False
        (cached,) = self.kv.count_cached([(prompt, namespace_of(sequence))], touch=False)
        return min(shared, len(prompt) - 1) - cached >= self.block_size

    def prefix_computed(self, sequence: Sequence, lease: Lease) -> None:
        """The prompt's KV is in the tree, or never will be: nobody needs to wait for it."""
        if lease.prefix_key is None:
            return
        with self._lock:
            key, lease.prefix_key = lease.prefix_key, None
            if key is not None:
                waiting = self._computing[key]
                waiting.remove(sequence)
                if not waiting:
                    del self._computing[key]

    def arrive(self, sequence: Sequence) -> bool:
        """The worker has the sequence: from here on it gives the lease back. False if it was reclaimed on the way."""
        return self._in_transit.pop(id(sequence.request), None) is not None

    @property
    def any_in_transit(self) -> bool:
        """Whether a lease was granted to a sequence that has not reached the worker."""
        return bool(self._in_transit)

    def reclaim(self, request: Request) -> bool:
        """Take back the lease of a request that ended on its way to the worker; False if there is none."""
        held = self._in_transit.pop(id(request), None)
        if held is not None:
            self.give_back_unused(*held)
        return held is not None

    def give_back_slots(self, slots: list[int]) -> None:
        """Rows ended."""
        with self._lock:
            self._free += slots

    def give_back_unused(self, sequence: Sequence, lease: Lease) -> None:
        """Return a lease that the worker never used."""
        self.prefix_computed(sequence, lease)
        self.kv.release(lease.blocks)
        self.kv.release(lease.fork_blocks)
        if lease.copy is not None:
            import numpy as np

            self.kv.release(np.array([lease.copy.source], np.int32))
        with self._lock:
            self._free.extend(lease.slots)


def common_prefix(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """Length of the common prefix of two token arrays."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    at = int(differs.argmax()) if length else 0
    return at if length and differs[at] else length
