"""Rows whose outputs are guided by a grammar: which tokens may come next, found while the device computes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...errors import RequestError
from ...models.guide_compiler import describe_error
from .token_mask import TokenMask

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from llguidance import LLExecutor, LLMatcher
    from numpy.typing import NDArray
    from torch import Tensor

    from ...models.guide_compiler import GuideCompiler
    from ...records import Guide


@dataclass(slots=True, eq=False)
class _GuidedRow:
    """A row's matcher, which has consumed all of the row's outputs."""

    slot: int
    may_end: bool  # by an end-of-sequence token, where the grammar allows an end
    matcher: LLMatcher | None = None
    conforms: bool = False  # nothing may follow
    error: str | None = None
    is_over: bool = False  # the matcher stands still, and what the row's last steps choose does not matter


@dataclass(slots=True)
class GuideOutcome:
    """What a step's tokens have led to, by their index in the step."""

    conforming: list[int]  # nothing may follow this token
    failed: dict[int, str]  # the row's next tokens could not be found, for this reason


class GuidedRows:
    """The guided rows of one executor, in their slots; masks have W words.

    Its methods are called by one thread. They hand the work to a second one, which does it in order, rows in parallel.
    """

    def __init__(self, compiler: GuideCompiler, num_slots: int, on_host: bool) -> None:
        """`on_host` says that logits are there, too."""
        self._compiler = compiler
        self._num_slots = num_slots
        self._on_host = on_host
        self._rows: dict[int, _GuidedRow] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sagellm-guide")

    def admit(self, slot: int, guide: Guide, may_end: bool, outputs: tuple[int, ...]) -> None:
        """A row enters a slot, or is all that `outputs` tell of it."""
        row = self._rows[slot] = _GuidedRow(slot, may_end)
        self._thread.submit(self._start, row, guide, outputs)

    def release(self, slot: int) -> None:
        """Forget a slot."""
        self._rows.pop(slot, None)

    def mask(self, slots: NDArray[np.int64]) -> Future[TokenMask] | None:
        """What the rows of a step, which are in `slots` [R], may choose; None if nothing guides any of them."""
        rows = [index for index, slot in enumerate(slots.tolist()) if slot in self._rows] if self._rows else []
        if not rows:
            return None
        return self._thread.submit(self._make_mask, np.array(rows, np.int64), slots)

    def advance(self, mask: TokenMask, slots: NDArray[np.int64], tokens: Tensor) -> Future[GuideOutcome]:
        """The masked rows of a step in `slots` [R] have chosen `tokens` [R], on the device: find what may follow."""
        rows = [self._rows[slot] for slot in slots[mask.rows].tolist()]
        return self._thread.submit(self._consume, [*zip(mask.rows.tolist(), rows, strict=True)], _copy_to_host(tokens))

    def close(self) -> None:
        """Wait for what is under way."""
        self._thread.shutdown()

    # -- on the second thread ----------------------------------------------------------------------------------------

    @cached_property
    def _bits(self) -> NDArray[np.int32]:
        """[S, W]: what may follow in each slot."""
        return np.full((self._num_slots, self._compiler.mask_words), -1, np.int32)

    @cached_property
    def _executor(self) -> LLExecutor:
        from llguidance import LLExecutor

        return LLExecutor()

    @cached_property
    def _usable(self) -> NDArray[np.int32]:
        """[2, W]: the tokens of the model that are there for a row, by whether it may end."""
        text = self._compiler.text_bits
        return np.stack([text, text | self._compiler.eos_bits])

    def _make_mask(self, rows: NDArray[np.int64], slots: NDArray[np.int64]) -> TokenMask:
        mask = TokenMask(rows, self._bits[slots[rows]])
        if self._on_host:
            mask.unpack(self._compiler.vocab_size)
        return mask

    def _start(self, row: _GuidedRow, guide: Guide, outputs: tuple[int, ...]) -> None:
        try:
            self._bits[row.slot] = -1
            row.matcher = self._compiler.new_matcher(guide)
            if not row.matcher.consume_tokens([*outputs]):
                raise RequestError(describe_error(row.matcher))
            self._fill([row])
        except Exception as error:
            self._fail([row], error)

    def _consume(self, chosen: list[tuple[int, _GuidedRow]], read_tokens: Callable[[], list[int]]) -> GuideOutcome:
        going = [(index, row) for index, row in chosen if not row.is_over]
        try:
            self._advance([row for _, row in going], [index for index, _ in going], read_tokens())
        except Exception as error:
            self._fail([row for _, row in going], error)
        return GuideOutcome(
            [index for index, row in going if row.conforms],
            {index: row.error for index, row in chosen if row.error is not None},
        )

    def _advance(self, rows: list[_GuidedRow], indices: list[int], tokens: list[int]) -> None:
        eos = self._compiler.tokenizer.eos_tokens
        consuming = []
        for row, index in zip(rows, indices, strict=True):
            row.is_over = row.may_end and tokens[index] in eos
            if not row.is_over:
                consuming.append((row, tokens[index]))
        if not consuming:
            return
        fine = self._executor.consume_token_par([(row.matcher, token) for row, token in consuming if row.matcher])
        for (row, _), consumed in zip(consuming, fine, strict=True):
            if not consumed and row.matcher:
                self._fail([row], RequestError(describe_error(row.matcher)))
        self._fill([row for row, _ in consuming if not row.is_over])

    def _fill(self, rows: list[_GuidedRow]) -> None:
        """Find what may follow what the rows' matchers have consumed."""
        from llguidance.numpy import fill_next_token_bitmask_par

        if not rows:
            return
        slots = [row.slot for row in rows]
        matchers = [(row.matcher, row.slot) for row in rows if row.matcher is not None]
        fill_next_token_bitmask_par(self._executor, matchers, self._bits)
        bits = self._bits[slots] & self._usable[[int(row.may_end) for row in rows]]
        self._bits[slots] = bits
        goes_on = (bits & self._usable[0]).any(axis=1).tolist()
        for row, has_tokens in zip(rows, goes_on, strict=True):
            assert row.matcher is not None
            if row.matcher.is_error():
                self._fail([row], RequestError(describe_error(row.matcher)))
            elif not has_tokens or row.matcher.is_stopped():
                if row.matcher.is_accepting():
                    row.conforms = row.is_over = True
                    self._bits[row.slot] = -1
                else:
                    self._fail([row], RequestError("the model has no token with which the output could go on"))

    def _fail(self, rows: list[_GuidedRow], error: Exception) -> None:
        for row in rows:
            said = f"{error}" if isinstance(error, RequestError) else f"{type(error).__name__}: {error}"
            row.error, row.is_over = f"the output cannot be guided any further: {said}", True
            self._bits[row.slot] = -1


def _copy_to_host(tokens: Tensor) -> Callable[[], list[int]]:
    """Start to copy; the function that is returned waits for that and for nothing that is queued later."""
    if not tokens.is_cuda:
        return tokens.tolist
    host = tokens.to("cpu", non_blocking=True)
    copied = torch.cuda.current_stream(tokens.device).record_event()

    def read() -> list[int]:
        copied.synchronize()
        return host.tolist()

    return read
