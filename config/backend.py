"""The section `backend`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from .base import Config, Positive
from .choices import Backend  # noqa: TC001 - pydantic reads the annotation
from .problems import not_available

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .problems import Contradiction


class BackendConfig(Config):
    """The device. `backend_type` None detects one: CUDA where there is one, else CPU.

    `device_ids` says which CUDA device, or, one for each worker of scheduler.mode strict, which; `threads` how many
    of the CPU's threads; 0 is every core.
    """

    backend_type: Backend = None
    device_ids: list[Annotated[int, Field(ge=0)]] = Field(default_factory=lambda: [0], min_length=1)
    threads: Annotated[int, Field(ge=0)] = 0
    cpu_kernels: Literal["auto", "torch"] = "auto"
    tensor_parallel_size: Positive = 1
    pipeline_parallel_size: Positive = 1

    def contradictions(self) -> Iterator[Contradiction]:
        for name in self.changed("tensor_parallel_size", "pipeline_parallel_size"):
            yield not_available(name, f"backend.{name} > 1", "use 1")
