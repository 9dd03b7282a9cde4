"""What a worker and its process tell each other."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ....records import Guide, SamplingParams
    from ...scheduler.plan import StepPlan


class Admission(NamedTuple):
    """A row enters a slot; `prompt_tokens` [T]."""

    slot: int
    prompt_tokens: NDArray[np.int32]
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...]
    guide: Guide | None
    choice: int


class Readmission(NamedTuple):
    """All that is known of a slot's row are its `outputs` [n]."""

    slot: int
    outputs: NDArray[np.int32]


class Release(NamedTuple):
    """A slot's row is gone."""

    slot: int


class Export(NamedTuple):
    """A KVExport. Its `number` is sent back as a notice when it is done."""

    number: int
    peer: int
    start: int
    end: int
    source_blocks: NDArray[np.int32]
    target_blocks: NDArray[np.int32]


@dataclass(slots=True)
class Step:
    """Slots that have changed since the last step, in order, and the plan, whose exports come apart.

    Answered by a StepResult or a Failure.
    """

    changes: list[Admission | Readmission | Release]
    plan: StepPlan
    exports: list[Export]


class SharedMemoryPool(NamedTuple):
    """A pool on the CPU: memory that comes as an open file."""

    shape: tuple[int, ...]
    dtype: str


class CUDAPool(NamedTuple):
    """A pool on a CUDA device: a pickled function and arguments that map it."""

    handle: bytes


PoolDescription = SharedMemoryPool | CUDAPool


@dataclass(slots=True)
class Connect:
    """From now on exports to this peer go to that pool; None is the null model's. Not answered."""

    peer: int
    pool: PoolDescription | None


@dataclass(slots=True)
class Close:
    """Finish what was launched and end. Not answered."""


@dataclass(slots=True)
class Ready:
    """The model is loaded. `pool` says how others map the KV tensor, where they are to."""

    backend_name: str
    pool: PoolDescription | None


class Failure:
    """Something raised `error`, which is given to the worker as it is where it can be pickled."""

    def __init__(self, error: BaseException) -> None:
        try:
            pickle.loads(pickle.dumps(error))
            self.error = error
        except Exception:
            self.error = RuntimeError(f"{type(error).__name__}: {error}")
