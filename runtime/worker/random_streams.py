"""Counter-based random numbers: one uniform per (seed, choice, output position), whatever else is in the batch.

A stream is SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014) whose state
can be computed for any position directly. It runs on the host, on a few numbers per step, so that CPU and CUDA draw
from bit-identical uniforms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def stream_key(seed: int, choice: int) -> int:
    """The 64-bit start of the stream of one choice (0-based) of a request; any Python int is a seed."""
    state = np.array([seed & _MASK], dtype=np.uint64)
    state = _mix(_mix(state + np.uint64(_GOLDEN)) + np.uint64(choice * _GOLDEN & _MASK))
    return int(state[0])


def uniforms(keys: NDArray[np.uint64], steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """keys [R], steps [R] -> [R] uniform on {0, 1, ..., 2^53 - 1} / 2^53, so never 1."""
    state = keys + (steps.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    return (_mix(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53
