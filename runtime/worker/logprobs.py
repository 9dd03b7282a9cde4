"""Log-probabilities of the model itself: log_softmax of the logits before bias, penalties, temperature and filters.

This is what vLLM returns by default, and what makes a sampled text's logprobs comparable across sampling settings.
Shape letters: R rows, T prompt positions, V vocabulary, k alternatives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...records import TokenLogprobs
from .ranking import rank_top

if TYPE_CHECKING:
    from torch import Tensor

_ROWS_AT_ONCE = 16


def token_logprobs(logprobs: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs [R, V] float32, tokens [R] -> (logprob [R], top ids [R, k], top logprobs [R, k]), best first.

    Equal logprobs are ordered by token id. k may be 0; more than V is V.
    """
    top_logprobs, top_ids = rank_top(logprobs, k)
    return logprobs.gather(1, tokens[:, None])[:, 0], top_ids, top_logprobs


@torch.inference_mode()
def prompt_logprobs(logits: Tensor, next_tokens: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """logits [T, V], next_tokens [T] int64 -> (logprob [T], top ids [T, k], top logprobs [T, k]), best first.

    `next_tokens[t]` is the prompt token at position t + 1. Works on a few rows at a time: no second [T, V] is made.
    """
    parts = [
        token_logprobs(rows.float().log_softmax(-1), tokens, k)
        for rows, tokens in zip(
            torch.split(logits, _ROWS_AT_ONCE), torch.split(next_tokens, _ROWS_AT_ONCE), strict=True
        )
    ]
    chosen, top_ids, top_logprobs = zip(*parts, strict=True)
    return torch.cat(chosen), torch.cat(top_ids), torch.cat(top_logprobs)


def to_records(
    tokens: list[int], logprobs: list[float], top_ids: list[list[int]], top_logprobs: list[list[float]], k: int
) -> list[TokenLogprobs]:
    """The host's copies, one entry per position, as the records that a completion carries, with k alternatives."""
    return [
        TokenLogprobs(token, logprob, list(zip(ids[:k], values[:k], strict=True)))
        for token, logprob, ids, values in zip(tokens, logprobs, top_ids, top_logprobs, strict=True)
    ]
