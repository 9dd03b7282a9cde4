"""Pins: which requests may keep their prompt in the cache for good, so that what runs beside them always fits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as Seq

    from ...kv_runtime.cache import KVCache
    from ...records import Request, Sequence


class PinBook:
    """Of each pool at most `max_blocks` are pinned. Only for the flow's thread.

    A request that pins reserves its prompt's blocks when it is checked, until they are pinned or it has ended. One that
    needs more blocks than pins leave is refused, and while it is there, so are pins that would not leave it enough.
    """

    def __init__(self, kvs: Seq[KVCache], max_blocks: int) -> None:
        self.served = False  # whether a stage commits prompts, and so pins them
        self._kvs = kvs
        self._max_blocks = max_blocks
        self._reserved: dict[int, int] = {}  # blocks, by id of the request
        self._large: dict[int, int] = {}  # blocks beside its own pin, likewise

    def check(self, sequence: Sequence, prompt_blocks: int, blocks: int) -> None:
        """Let a sequence in that may come to need so many blocks; it must be let `end`.

        Raises:
            RequestError: it pins, or needs more blocks, than there is room for beside what is pinned; or nobody pins.
        """
        request, kv = sequence.request, self._kvs[0]
        if request.pin or request.unpin:
            self._check_asked(request)
        own = prompt_blocks if request.pin else 0
        blocks += self._copies(sequence)
        pinned = self._num_pinned
        if own and pinned + own > self._max_blocks:
            raise RequestError(
                f"pin: {prompt_blocks} KV blocks to pin and {pinned} pinned ones are more than the {self._max_blocks} "
                "that may be: unpin others, shorten the prompt, or raise kv_cache.max_pinned_ratio or max_tokens"
            )
        if blocks + pinned > kv.num_blocks:
            raise RequestError(
                f"prompt of {len(sequence.prompt_tokens)} tokens + max_new_tokens {sequence.sampling.max_new_tokens} "
                f"needs {blocks} KV blocks, {pinned} of the pool's {kv.num_blocks} are pinned: shorten it, unpin "
                "prompts or raise kv_cache.max_tokens"
            )
        if own and (largest := max(self._large.values(), default=0)) + pinned + own > kv.num_blocks:
            raise RequestError(
                f"pin: {own} more pinned KV blocks would leave too few to a request under way that may need {largest} "
                f"of {kv.num_blocks}: pin before such requests or after them, or raise kv_cache.max_tokens"
            )
        if own:
            self._reserved[id(request)] = own
        if blocks - own > kv.num_blocks - self._max_blocks:
            self._large[id(request)] = blocks - own

    def room(self, sequence: Sequence) -> int:
        """How many blocks it may need beside what is pinned now."""
        return self._kvs[0].num_blocks - self._num_pinned - self._copies(sequence)

    @property
    def _num_pinned(self) -> int:
        return max(kv.num_pinned for kv in self._kvs) + sum(self._reserved.values())

    def _copies(self, sequence: Sequence) -> int:
        """Preempted, it goes on in a copy of the block that its pin fills in part."""
        return int(sequence.request.pin and len(sequence.prompt_tokens) % self._kvs[0].block_size > 0)

    def _check_asked(self, request: Request) -> None:
        name = "pin" if request.pin else "unpin"
        if request.pin and request.unpin:
            raise RequestError("found pin and unpin: write one of them")
        if not self.served or not self._kvs[0].shares_prefixes:
            stage = "nothing is cached" if self.served else "the pipeline has no kv_commit"
            raise RequestError(f"found {name}, but {stage}: leave it out, or have prefixes cached behind kv_commit")

    def pinned(self, sequences: Iterable[Sequence]) -> None:
        """Their prompts have been committed: those that pin are pinned now."""
        for sequence in sequences:
            self._reserved.pop(id(sequence.request), None)

    def end(self, requests: Iterable[Request]) -> None:
        """The requests have ended, somehow."""
        if self._reserved or self._large:
            for request in requests:
                self._reserved.pop(id(request), None)
                self._large.pop(id(request), None)
