"""Choose the device that a configuration asks for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..config import BackendType
from ..errors import ConfigError
from .host import cpu_quota

if TYPE_CHECKING:
    from ..config import BackendConfig
    from .base import Backend


def detect_backend(config: BackendConfig) -> Backend:
    """The backend for `config`: the one it names, else CUDA where there is a device, else the CPU.

    On the CPU this also sets torch's thread count for the whole process: `threads`, or torch's own default (every
    physical core) within the control group's quota.

    Raises:
        ConfigError: CUDA is asked for and torch sees none, there is no device with that id, or threads or kernels of
            the CPU are asked for where the device is none.
    """
    _shorten_spinning()
    import torch

    wanted = config.backend_type
    if wanted is None:
        wanted = BackendType.CUDA if torch.cuda.is_available() else BackendType.CPU
    if wanted is BackendType.CUDA:
        from .cuda import CUDABackend

        index, count = config.device_ids[0], torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise ConfigError(
                "backend.backend_type: cuda is asked for, but torch sees no CUDA device: "
                "write `backend_type: cpu`, or leave it out"
            )
        if index >= count:
            raise ConfigError(f"backend.device_ids: found {index}, but the CUDA devices are 0 to {count - 1}")
        for name, value, default in (("threads", config.threads, 0), ("cpu_kernels", config.cpu_kernels, "auto")):
            if value != default:
                raise ConfigError(
                    f"backend.{name}: found {value}, but it is the CPU's and the device is CUDA: "
                    "leave it out, or write `backend_type: cpu`"
                )
        return CUDABackend(torch.device("cuda", index))

    if config.device_ids != [0]:
        raise ConfigError(
            f"backend.device_ids: found {config.device_ids[0]}, but the device is the CPU, of which there is one: "
            "leave it out, or write `backend_type: cuda`"
        )
    from .cpu import make_cpu_backend

    default = torch.get_num_threads()
    torch.set_num_threads(config.threads or min(default, cpu_quota() or default))
    return make_cpu_backend(allow_kernels=config.cpu_kernels == "auto")


def _shorten_spinning() -> None:
    """Let OpenMP's threads sleep after some 0.2 ms of waiting, where GNU OpenMP spins for 5 ms unless told otherwise.

    A step's parallel regions follow each other within 0.1 ms. When the dataflow's own thread needs one of two cores,
    long spinning keeps the displaced worker off the processor: measured, a step of 7.5 ms became one of 70 ms. Read
    once by the OpenMP library, so it acts only if torch has not been imported before.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "5000"
