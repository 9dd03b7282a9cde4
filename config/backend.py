"""The section `backend`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .base import Config, Positive, refuse
from .choices import Backend  # noqa: TC001 - pydantic reads the annotation


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

    @model_validator(mode="after")
    def _available(self) -> BackendConfig:
        refuse(self.tensor_parallel_size > 1, "backend.tensor_parallel_size > 1", "use 1")
        refuse(self.pipeline_parallel_size > 1, "backend.pipeline_parallel_size > 1", "use 1")
        return self
