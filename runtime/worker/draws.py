"""One token per row by inverse transform sampling: the first whose cumulative probability passes u * total.

Every function gives a row the same token whatever the other rows are: reductions run per row or per block of a row,
and sums that decide are accumulated in float64. Shape letters: R rows, V vocabulary, K ranked tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from .ranking import rank_all, rank_top, split_blocks

if TYPE_CHECKING:
    from torch import Tensor

MAX_TOP_K = 128  # up to here the k best are selected; above, everything is sorted
_NUCLEUS_GUESS = 64  # most nuclei are smaller: try so many tokens before sorting everything
_SORT_AT_ONCE = 1 << 18  # on the CPU: as many keys as stay in the cache are twice as fast as all at once
_BELOW_ONE = 1.0 - 2.0**-53


@dataclass(slots=True)
class Draw:
    """Per row, all float64 [R, 1] on the logits' device: how to shape the distribution, and the uniform number."""

    inverse_temperature: Tensor
    top_k: Tensor  # infinite is off
    top_p: Tensor
    min_p: Tensor
    u: Tensor

    def select(self, rows: Tensor) -> Draw:
        return Draw(self.inverse_temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows], self.u[rows])


def draw_whole(logits: Tensor, draw: Draw) -> Tensor:
    """Temperature only: float32 logits [R, V] (overwritten) -> tokens [R], drawn in the order of ids."""
    blocks = split_blocks(_soften(logits, draw), 0.0)
    sums = blocks.sum(-1).double()
    cumulative = sums.cumsum(-1)
    target = draw.u * cumulative[:, -1:]
    block = _first_above(cumulative, target)
    before = pad(cumulative, (1, 0)).gather(1, block)
    share = ((target - before) / sums.gather(1, block)).clamp(0.0, _BELOW_ONE)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, blocks.shape[2]))[:, 0].double().cumsum(-1)
    token = block * blocks.shape[2] + _first_above(inside, share * inside[:, -1:])
    return token[:, 0]


def draw_top_k(logits: Tensor, draw: Draw, largest_k: int) -> Tensor:
    """Rows with a top-k of at most `largest_k`: float32 logits [R, V] -> tokens [R], drawn in the order of rank."""
    values, ids = rank_top(logits, largest_k)
    values = values.double()
    weights = ((values - values[:, :1]) * draw.inverse_temperature).exp()
    return _draw_ranked(_cut(weights, draw), ids, draw)


def draw_sorted(logits: Tensor, draw: Draw) -> Tensor:
    """Any top-k and top-p: float32 logits [R, V] (overwritten) -> tokens [R], drawn in the order of rank."""
    return _draw_sorted_probs(_soften(logits, draw), draw)


def draw_nucleus(logits: Tensor, draw: Draw) -> Tensor:
    """Top-p, min-p or both, no top-k: float32 logits [R, V] (overwritten) -> tokens [R], drawn in the order of rank.

    On the CPU the few best tokens are tried first, and only rows whose nucleus is larger are sorted. A GPU sorts at
    once: to look at which rows are done would make the host wait for the device.
    """
    probs = _soften(logits, draw)
    if probs.device.type != "cpu":
        return _draw_sorted_probs(probs, draw)
    values, ids = rank_top(probs, _NUCLEUS_GUESS)
    weights = _cut(values.double(), draw)
    tokens = _draw_ranked(weights, ids, draw)
    larger = (weights[:, -1:] > 0) & ((draw.min_p > 0) | (weights.cumsum(-1)[:, -1:] < draw.top_p))
    rows = larger[:, 0].nonzero()[:, 0]
    if len(rows):
        tokens[rows] = _draw_sorted_probs(probs[rows], draw.select(rows))
    return tokens


def _draw_sorted_probs(probs: Tensor, draw: Draw) -> Tensor:
    at_once = max(1, _SORT_AT_ONCE // probs.shape[1])
    if probs.device.type == "cpu" and len(probs) > at_once:
        rows = torch.split(torch.arange(len(probs)), at_once)
        return torch.cat([_draw_sorted_probs(probs[row], draw.select(row)) for row in rows])
    values, ids = rank_all(probs)
    return _draw_ranked(_cut(values.double(), draw), ids, draw)


def _soften(logits: Tensor, draw: Draw) -> Tensor:
    """Probabilities at the row's temperature, in place: the only passes over memory are these."""
    logits.mul_(draw.inverse_temperature.float())
    return torch.softmax(logits, -1, out=logits)


def _cut(weights: Tensor, draw: Draw) -> Tensor:
    """Ranked weights [R, K] with zeros where min-p or top-k forbids."""
    rank = torch.arange(weights.shape[-1], device=weights.device)
    return weights.masked_fill((weights < draw.min_p * weights[:, :1]) | (rank >= draw.top_k), 0.0)


def _draw_ranked(weights: Tensor, ids: Tensor, draw: Draw) -> Tensor:
    """Top-p over ranked weights [R, K], then one draw among the tokens left.

    A token stays while the tokens ranked before it hold less than top_p of the mass, the first one always. The mass is
    what min-p and top-k left; where neither cuts, K may be too few to hold it, but then weights are probabilities and
    it is 1.
    """
    cumulative = weights.cumsum(-1)
    uncut = (draw.min_p == 0) & draw.top_k.isinf()
    limit = draw.top_p * torch.where(uncut, 1.0, cumulative[:, -1:])
    keep = cumulative - weights < limit
    kept = torch.where(keep, cumulative, cumulative[:, :1]).amax(-1, keepdim=True)
    return ids.gather(1, _first_above(cumulative, draw.u * kept))[:, 0]


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """cumulative [R, K] ascending, target [R, 1] -> [R, 1], the first index whose value exceeds the target."""
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=cumulative.shape[-1] - 1)
