"""Rows whose outputs are guided by a grammar: which tokens may come next, found while the device computes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property, partial
from time import thread_time
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...errors import RequestError
from ...models.guide_compiler import MASK_S, TOO_SLOW, describe_error, run_apart
from .token_mask import TokenMask

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from llguidance import LLExecutor, LLMatcher
    from numpy.typing import NDArray
    from torch import Tensor

    from ...models.guide_compiler import GuideCompiler
    from ...records import Guide


_STEP_ROW_S = 0.01  # so much longer than a mask may a step take for each row
_START_S = 2.0  # until rows have been started
_START_TOKEN_S = 0.01  # more for each output that one starts from


@dataclass(slots=True, eq=False)
class _GuidedRow:
    """A row's matcher, which has consumed all of the row's outputs."""

    guide: Guide
    outputs: list[int]
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
    No limit of llguidance's bounds the time that an ambiguous grammar takes. So a step whose masks take too long is
    given up: each of its rows starts again from its outputs, on a thread of its own, and those that are slow end.
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
        row = self._rows[slot] = _GuidedRow(guide, [*outputs], slot, may_end)
        self._thread.submit(self._start, [row])

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
        return _new_executor()

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

    def _start(self, rows: list[_GuidedRow]) -> None:
        """Each on a thread of its own, from the outputs that it has."""
        self._bits[[row.slot for row in rows]] = -1
        begun = {run_apart(partial(self._match, row.guide, (*row.outputs,))): row for row in rows}
        done, late = wait(begun, _START_S + _START_TOKEN_S * max(len(row.outputs) for row in rows))
        self._fail([begun[each] for each in late], RequestError(TOO_SLOW))
        started = []
        for each in done:
            row = begun[each]
            try:
                row.matcher, self._bits[row.slot], seconds = each.result()
            except Exception as error:
                self._fail([row], error)
                continue
            if seconds > MASK_S:
                self._fail([row], RequestError(TOO_SLOW))
            else:
                started.append(row)
        self._judge(started)

    def _match(self, guide: Guide, outputs: tuple[int, ...]) -> tuple[LLMatcher, NDArray[np.int32], float]:
        """A matcher that has consumed these outputs, what may follow, and the seconds of computing that it took."""
        from llguidance.numpy import fill_next_token_bitmask

        matcher, bits = self._compiler.new_matcher(guide), np.empty((1, self._compiler.mask_words), np.int32)
        executor = _new_executor(1)  # where a slow row takes no other's threads
        for token in outputs:
            self._consume_tokens(executor, [(matcher, token)])
        if matcher.is_error():
            raise RequestError(describe_error(matcher))
        began = thread_time()
        fill_next_token_bitmask(matcher, bits)
        return matcher, bits[0], thread_time() - began

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
                row.outputs.append(tokens[index])
                consuming.append(row)
        if not consuming:
            return
        stepping = run_apart(partial(self._step, consuming, self._bits))
        try:
            stepping.result(MASK_S + _STEP_ROW_S * len(consuming))
        except TimeoutError:
            self._bits, self._executor = self._bits.copy(), _new_executor()  # the old ones are the late step's
            self._start(consuming)
        else:
            self._judge(consuming)

    def _step(self, rows: list[_GuidedRow], bits: NDArray[np.int32]) -> None:
        """Consume the last output of each row, and find what may follow."""
        from llguidance.numpy import fill_next_token_bitmask_par

        matchers = [(row.matcher, row.outputs[-1], row.slot) for row in rows if row.matcher is not None]
        executor = self._executor
        self._consume_tokens(executor, [(matcher, token) for matcher, token, _ in matchers])
        fill_next_token_bitmask_par(executor, [(matcher, slot) for matcher, _, slot in matchers], bits)

    def _consume_tokens(self, executor: LLExecutor, pairs: list[tuple[LLMatcher, int]]) -> None:
        """While other Python threads go on, which llguidance lets them only where there are two matchers."""
        from llguidance import LLMatcher

        if len(pairs) == 1:
            pairs = [*pairs, (LLMatcher(self._compiler.tokenizer, "", log_level=0), 0)]  # in error: consumes nothing
        executor.consume_token_par(pairs)

    def _judge(self, rows: list[_GuidedRow]) -> None:
        """Whether the rows' matchers allow what the model can say."""
        if not rows:
            return
        slots = [row.slot for row in rows]
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


def _new_executor(num_threads: int | None = None) -> LLExecutor:
    from llguidance import LLExecutor

    return LLExecutor(num_threads)


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
