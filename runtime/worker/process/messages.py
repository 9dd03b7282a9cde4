"""What a worker and its process tell each other."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ....records import SamplingParams
    from ...scheduler.plan import StepPlan


class Admission(NamedTuple):
    """A row enters a slot; `prompt_tokens` [T]."""

    slot: int
    prompt_tokens: NDArray[np.int32]
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...]
    choice: int


class Readmission(NamedTuple):
    """All that is known of a slot's row are its `outputs` [n]."""

    slot: int
    outputs: NDArray[np.int32]


class Release(NamedTuple):
    """A slot's row is gone."""

    slot: int


@dataclass(slots=True)
class Step:
    """Slots that have changed since the last step, in order, and the plan. Answered by a StepResult or a Failure."""

    changes: list[Admission | Readmission | Release]
    plan: StepPlan


@dataclass(slots=True)
class Close:
    """Finish what was launched and end. Not answered."""


@dataclass(slots=True)
class Ready:
    """The model is loaded. `pool` says how others map the KV tensor, where they may."""

    backend_name: str
    pool: Any = field(default=None)


class Failure:
    """Something raised `error`, which is given to the worker as it is where it can be pickled."""

    def __init__(self, error: BaseException) -> None:
        try:
            pickle.loads(pickle.dumps(error))
            self.error = error
        except Exception:
            self.error = RuntimeError(f"{type(error).__name__}: {error}")
