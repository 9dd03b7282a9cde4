"""How fast bytes move between the device, the host's memory and a disk."""

from __future__ import annotations

import os
import tempfile
import time
from typing import TYPE_CHECKING

import torch

from ...accel.device_rates import LinkRates
from ...errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ...backends.base import Backend

SMALL, LARGE = 64 << 10, 64 << 20  # bytes
REPEATS = 5


def measure_links(backend: Backend, nvme_folder: Path | None = None) -> dict[str, LinkRates]:
    """Rates of the paths "ddr" (host memory to device), "nvme" (a file to host memory; in `nvme_folder`, else the
    folder for temporary files) and "handover" (device to device, through the host where they share none)."""
    ddr = _measure_copies(backend)
    return {"ddr": ddr, "nvme": _measure_file(nvme_folder), "handover": ddr}


def _measure_copies(backend: Backend) -> LinkRates:
    def copy(num_bytes: int) -> Callable[[], object]:
        host = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=backend.device.type == "cuda")
        device = torch.zeros(num_bytes, dtype=torch.uint8, device=backend.device)

        def run() -> None:
            device.copy_(host)
            backend.synchronize()

        return run

    return _fit(*(_shortest(copy(size)) for size in (SMALL, LARGE)))


def _measure_file(folder: Path | None) -> LinkRates:
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"kv_cache.nvme_path: {folder} cannot be a folder: {error.strerror}") from error
        if not os.access(folder, os.W_OK):  # what others write there is read; how fast, a file elsewhere tells
            folder = None
    with tempfile.NamedTemporaryFile(dir=folder, prefix="sagellm-measure-") as file:
        file.write(os.urandom(1 << 20) * (LARGE >> 20))
        file.flush()
        os.fsync(file.fileno())
        descriptor = file.fileno()
        buffer = memoryview(bytearray(LARGE))

        def read(num_bytes: int) -> Callable[[], object]:
            def run() -> None:
                if hasattr(os, "posix_fadvise"):  # from the disk, not from the kernel's copy
                    os.posix_fadvise(descriptor, 0, LARGE, os.POSIX_FADV_DONTNEED)
                os.preadv(descriptor, [buffer[:num_bytes]], 0)

            return run

        return _fit(*(_shortest(read(size)) for size in (SMALL, LARGE)))


def _shortest(call: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def _fit(small_s: float, large_s: float) -> LinkRates:
    bytes_per_s = (LARGE - SMALL) / max(large_s - small_s, 1e-9)
    return LinkRates(max(0.0, small_s - SMALL / bytes_per_s), bytes_per_s)
