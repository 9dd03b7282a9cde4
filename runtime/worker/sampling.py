"""Choosing the next token of every row of a step, vectorised over the batch, on CPU and CUDA.

The order, as in vLLM: logit_bias; stop tokens forbidden until min_tokens; repetition penalty (prompt and output),
presence and frequency penalty (output); what a guide forbids; temperature; min-p; top-k; top-p over what those two
left. (transformers applies min-p last, which differs only in that its top-p still counts what min-p removes.) Top-k
keeps exactly k: equal logits go by token id. Logprobs are those of the model, before all of this: see logprobs.py.

Rows live in slots. What a row needs is written once, at `admit`; a step then reads host arrays to decide which work
the batch needs, and an all-greedy batch costs one argmax. The steps' random numbers are a function of seed, choice
and position, and no reduction spans rows: a row's token does not depend on its slot or on the rest of the batch.
Shape letters: R rows of a step, V vocabulary, k the largest number of logprob alternatives asked for in it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import IntFlag
from typing import TYPE_CHECKING

import numpy as np
import torch

from .draws import MAX_TOP_K, Draw, draw_nucleus, draw_sorted, draw_top_k, draw_whole
from .logprobs import token_logprobs
from .penalties import NamedTokens, TokenHistory, to_device
from .random_streams import stream_key, uniforms
from .ranking import argmax
from .sampling_checks import check_sampling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from ...records import SamplingParams
    from .token_mask import TokenMask

_NEVER = -1e30  # added to a logit; not infinite: a token is chosen nevertheless where a guide forbids all others
_GREEDY_BELOW = 1e-5  # a smaller temperature would overflow float32 logits


@dataclass(slots=True)
class SampledTokens:
    """What one step chose, on the device. Rows that asked for no logprobs hold NaN there, and -1 as ids."""

    tokens: Tensor  # [R] int64
    logprobs: Tensor | None = None  # [R] float32; None when no row asked
    top_ids: Tensor | None = None  # [R, k] int64, best first
    top_logprobs: Tensor | None = None  # [R, k] float32


class _Need(IntFlag):
    """What a slot's rows need beyond argmax."""

    BIAS = 1
    MIN_TOKENS = 2
    REPETITION = 4
    OUTPUT_PENALTY = 8
    WHOLE = 16  # draw from the whole distribution
    TOP_K = 32  # draw from the best few
    NUCLEUS = 64
    SORTED = 128
    LOGPROBS = 256

    DRAW = WHOLE | TOP_K | NUCLEUS | SORTED
    HISTORY = REPETITION | OUTPUT_PENALTY


class SamplingState:
    """Sampling parameters and token histories of the resident rows, one slot each."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device | str) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._needs = np.zeros(num_slots, np.int64)
        self._temperature = np.ones(num_slots)
        self._top_k = np.full(num_slots, np.inf)
        self._top_p = np.ones(num_slots)
        self._min_p = np.zeros(num_slots)
        self._repetition = np.ones(num_slots)
        self._presence = np.zeros(num_slots)
        self._frequency = np.zeros(num_slots)
        self._keys = np.zeros(num_slots, np.uint64)
        self._min_tokens = np.zeros(num_slots, np.int64)
        self._logprobs = np.zeros(num_slots, np.int64)
        self._bias = NamedTokens(num_slots, self.device)
        self._forbidden = NamedTokens(num_slots, self.device)
        self._history = TokenHistory(num_slots, self.device)

    @torch.inference_mode()
    def admit(
        self,
        slot: int,
        params: SamplingParams,
        prompt_tokens: Sequence[int] | NDArray[np.int32],
        eos_token_ids: Sequence[int],
        output_tokens: Sequence[int] = (),
        choice: int = 0,
    ) -> None:
        """Write a slot, whatever it held before.

        `output_tokens` are those drawn before a preemption; the next step of the slot is their number. `choice` is the
        row's index among the request's n. Without a seed the row gets a fresh one. `eos_token_ids` are forbidden
        until min_tokens unless `ignore_eos`, stop_token_ids always. `prompt_tokens` must not be empty.

        Raises:
            RequestError: a parameter is out of range.
        """
        check_sampling(params, self.vocab_size)
        params = params.with_defaults()
        seed = random.getrandbits(64) if params.seed is None else params.seed
        self._keys[slot] = stream_key(seed, choice)
        self._temperature[slot] = params.temperature
        self._top_k[slot] = params.top_k
        if not 0 < self._top_k[slot] < self.vocab_size:
            self._top_k[slot] = np.inf
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._repetition[slot] = params.repetition_penalty
        self._presence[slot] = params.presence_penalty
        self._frequency[slot] = params.frequency_penalty
        self._min_tokens[slot] = params.min_tokens
        self._logprobs[slot] = params.logprobs or 0

        needs = self._find_draw(slot)
        if params.logit_bias:
            needs |= _Need.BIAS
            self._bias.write(slot, params.logit_bias)
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_token_ids))
        forbidden = {token: _NEVER for token in ends if token < self.vocab_size}
        if params.min_tokens > len(output_tokens) and forbidden:
            needs |= _Need.MIN_TOKENS
            self._forbidden.write(slot, forbidden)
        if params.repetition_penalty != 1:
            needs |= _Need.REPETITION
        if params.presence_penalty or params.frequency_penalty:
            needs |= _Need.OUTPUT_PENALTY
        if needs & _Need.HISTORY:
            self._history.write(slot, prompt_tokens, output_tokens)
        if params.logprobs is not None:
            needs |= _Need.LOGPROBS
        self._needs[slot] = needs

    def release(self, slot: int) -> None:
        """Forget a slot; steps already launched for it stay valid."""
        self._needs[slot] = 0

    @torch.inference_mode()
    def sample(
        self, logits: Tensor, slots: NDArray[np.int64], steps: NDArray[np.int64], mask: TokenMask | None = None
    ) -> SampledTokens:
        """Choose one token per row, without waiting for the device.

        logits [R, V] float on the device, which may be overwritten; slots and steps [R] are on the host: each row's
        slot, and the 0-based index of the output token to be chosen. Rows that `mask` names choose among its tokens.
        """
        needs = self._needs[slots]
        wanted = int(np.bitwise_or.reduce(needs)) if len(needs) else 0
        if not wanted and mask is None:
            return SampledTokens(argmax(logits))
        logits = logits.float().contiguous()
        logprobs: Tensor | None = None
        logprob_rows = np.flatnonzero(needs & _Need.LOGPROBS)
        if len(logprob_rows):
            asked = logits if len(logprob_rows) == len(logits) else logits[to_device(logprob_rows, self.device)]
            logprobs = asked.log_softmax(-1)
        self._adjust(logits, needs, slots, steps)
        if mask is not None:
            mask.apply(logits)
        tokens = self._choose(logits, needs, slots, steps)
        if wanted & _Need.HISTORY:
            rows = np.flatnonzero(needs & _Need.HISTORY)
            self._history.append(tokens, rows, slots[rows], steps[rows])
        if logprobs is None:
            return SampledTokens(tokens)
        return self._find_logprobs(logprobs, tokens, logprob_rows, slots)

    def _find_draw(self, slot: int) -> _Need:
        """Which way of drawing the slot takes; its own parameters alone decide, never the batch's."""
        if self._temperature[slot] < _GREEDY_BELOW or self._top_k[slot] == 1:
            return _Need(0)
        if self._top_k[slot] <= MAX_TOP_K:
            return _Need.TOP_K
        if np.isfinite(self._top_k[slot]):
            return _Need.SORTED
        return _Need.NUCLEUS if self._top_p[slot] < 1 or self._min_p[slot] > 0 else _Need.WHOLE

    def _adjust(
        self, logits: Tensor, needs: NDArray[np.int64], slots: NDArray[np.int64], steps: NDArray[np.int64]
    ) -> None:
        rows = np.flatnonzero(needs & _Need.BIAS)
        if len(rows):
            self._bias.apply(logits, rows, slots[rows])
        rows = np.flatnonzero((needs & _Need.MIN_TOKENS).astype(bool) & (steps < self._min_tokens[slots]))
        if len(rows):
            self._forbidden.apply(logits, rows, slots[rows])
        rows = np.flatnonzero(needs & _Need.REPETITION)
        if len(rows):
            slot = slots[rows]
            self._history.penalize_repetition(logits, rows, slot, steps[rows], self._repetition[slot])
        rows = np.flatnonzero((needs & _Need.OUTPUT_PENALTY).astype(bool) & (steps > 0))
        if len(rows):
            slot = slots[rows]
            self._history.penalize_output(logits, rows, slot, steps[rows], self._presence[slot], self._frequency[slot])

    def _choose(
        self, logits: Tensor, needs: NDArray[np.int64], slots: NDArray[np.int64], steps: NDArray[np.int64]
    ) -> Tensor:
        ways = needs & _Need.DRAW
        groups = [(way, np.flatnonzero(ways == way)) for way in np.unique(ways)]
        if len(groups) == 1:
            return self._draw(logits, groups[0][0], slots, steps)
        tokens = torch.empty(len(ways), dtype=torch.int64, device=self.device)
        for way, rows in groups:
            index = to_device(rows, self.device)
            tokens[index] = self._draw(logits[index], way, slots[rows], steps[rows])
        return tokens

    def _draw(self, logits: Tensor, way: int, slots: NDArray[np.int64], steps: NDArray[np.int64]) -> Tensor:
        if not way:
            return argmax(logits)
        top_k = self._top_k[slots]
        shape = np.stack(
            (
                1 / self._temperature[slots],
                top_k,
                self._top_p[slots],
                self._min_p[slots],
                uniforms(self._keys[slots], steps),
            )
        )
        draw = Draw(*to_device(shape, self.device).unsqueeze(-1))
        if way == _Need.TOP_K:
            return draw_top_k(logits, draw, int(top_k.max()))
        if way == _Need.WHOLE:
            return draw_whole(logits, draw)
        return draw_nucleus(logits, draw) if way == _Need.NUCLEUS else draw_sorted(logits, draw)

    def _find_logprobs(
        self, logprobs: Tensor, tokens: Tensor, rows: NDArray[np.int64], slots: NDArray[np.int64]
    ) -> SampledTokens:
        k = int(self._logprobs[slots[rows]].max())
        if len(rows) == len(tokens):
            return SampledTokens(tokens, *token_logprobs(logprobs, tokens, k))
        index = to_device(rows, self.device)
        found = token_logprobs(logprobs, tokens[index], k)
        everywhere = []
        for some, missing in zip(found, (torch.nan, -1, torch.nan), strict=True):
            everywhere.append(some.new_full((len(tokens), *some.shape[1:]), missing))
            everywhere[-1][index] = some
        return SampledTokens(tokens, *everywhere)
