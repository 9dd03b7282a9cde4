"""From measured times of nodes to the rates of a device."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .device_rates import DeviceRates, OperationRates
from .execution_graph import NodeKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from .device_rates import LinkRates

_ATTENTION = (NodeKind.DECODE_ATTN, NodeKind.PREFILL_ATTN)
_TINY = 1e-9  # seconds: rates stay finite where a time is all launch


class Observation(NamedTuple):
    """One node, measured."""

    kind: NodeKind
    rows: int
    flops: float
    num_bytes: float
    seconds: float


def fit_rates(
    observations: Iterable[Observation], step_s: float, links: Mapping[str, LinkRates] | None = None
) -> DeviceRates:
    """The rates that explain the observations. Of several of the same work the median counts.

    Raises:
        ValueError: there is none of some kind that computes.
    """
    same: dict[tuple[NodeKind, int, float, float], list[float]] = defaultdict(list)
    for kind, rows, flops, num_bytes, seconds in observations:
        same[kind, rows, flops, num_bytes].append(seconds)
    by_kind: dict[NodeKind, list[Observation]] = defaultdict(list)
    for work, times in same.items():
        by_kind[work[0]].append(Observation(*work, median(times)))
    missing = [str(kind) for kind in NodeKind if not kind.is_transfer and not by_kind.get(kind)]
    if missing:
        raise ValueError(f"nothing was measured of {', '.join(missing)}")
    # A norm of few rows is nothing but a launch.
    launch_s = min(one.seconds for one in by_kind[NodeKind.LAYERNORM])
    operations = {
        kind: _fit_attention(found) if kind in _ATTENTION else _fit_rows(found, launch_s)
        for kind, found in by_kind.items()
    }
    return DeviceRates(operations, dict(links or {}), step_s)


def _fit_rows(observations: list[Observation], launch_s: float) -> OperationRates:
    """Work that follows the rows: a rate for each number of rows that was measured."""
    found = sorted(observations)
    rows, flops, num_bytes, seconds = (np.array(column, float) for column in list(zip(*found, strict=True))[1:])
    # More rows do not take less time: where they seem to, the fewer rows were disturbed.
    seconds = np.minimum.accumulate(seconds[::-1])[::-1]
    launch_s = min(launch_s, 0.9 * float(seconds[0]))
    work = np.maximum(seconds - launch_s, _TINY)
    return _rates(rows, flops / work, float((num_bytes / work).max()), launch_s, 0.0)


def _fit_attention(observations: list[Observation]) -> OperationRates:
    """Seconds = launch + rows * row_s + flops / rate by least squares of the relative error, none below 0; then the
    rate of each number of rows at its longest contexts, if those were long enough to tell. On a device that a launch
    for each row keeps busy none may be: then the one rate of the least squares, which may be next to no time at all.

    More rows go at no lower rate: where they seem to, they were disturbed."""
    found = sorted(observations)
    rows, flops, num_bytes, seconds = (np.array(column, float) for column in list(zip(*found, strict=True))[1:])
    columns = np.stack([np.ones(len(rows)), rows, flops], axis=1) / seconds[:, None]
    launch_s, row_s, flop_s = nonnegative_least_squares(columns, np.ones(len(rows)))
    work = np.maximum(seconds - launch_s - row_s * rows, _TINY)
    longest = [int(np.flatnonzero(rows == count)[flops[rows == count].argmax()]) for count in np.unique(rows)]
    at = [index for index in longest if work[index] > seconds[index] / 2]
    if not at:
        work = np.maximum(flop_s * flops, _TINY)
        at = [int(flops.argmax())]
        rows = np.ones(len(rows))
    rates = np.maximum.accumulate((flops / work)[at])
    return _rates(rows[at], rates, float((num_bytes / work)[at].max()), float(launch_s), float(row_s))


def _rates(
    rows: NDArray[np.float64], rates: NDArray[np.float64], bytes_per_s: float, launch_s: float, row_s: float
) -> OperationRates:
    knots = tuple(int(count) for count in rows)
    return OperationRates(knots, tuple(rates.tolist()), bytes_per_s, launch_s, row_s)


def nonnegative_least_squares(columns: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """The x >= 0 for which `columns` [n, k] @ x is nearest to `wanted` [n]. Tries every set of columns: for few."""
    count = columns.shape[1]
    scale = np.maximum(np.abs(columns).max(axis=0), np.finfo(float).tiny)
    best, best_error = np.zeros(count), float(wanted @ wanted)
    for size in range(1, count + 1):
        for chosen in map(list, combinations(range(count), size)):
            scaled = columns[:, chosen] / scale[chosen]
            part = np.linalg.lstsq(scaled, wanted, rcond=None)[0]
            error = float(((scaled @ part - wanted) ** 2).sum())
            if (part >= 0).all() and error < best_error:
                best, best_error = np.zeros(count), error
                best[chosen] = part / scale[chosen]
    return best
