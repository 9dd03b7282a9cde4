"""Which backend a configuration gets, and what the host allows."""

from __future__ import annotations

import os

import pytest
import torch

from sageLLM.backends import detect_backend, host
from sageLLM.backends.cpu import CPUBackend
from sageLLM.config import BackendConfig
from sageLLM.errors import ConfigError

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def test_cpu_with_so_many_threads() -> None:
    backend = detect_backend(BackendConfig(backend_type="cpu", threads=2))
    assert (backend.name, backend.device.type, torch.get_num_threads()) == ("cpu", "cpu", 2)


def test_threads_stay_within_the_quota(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    assert host.cpu_quota() is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert host.cpu_quota() is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert host.cpu_quota() == 2
    torch.set_num_threads(4)
    detect_backend(BackendConfig(backend_type="cpu"))
    assert torch.get_num_threads() == 2


def test_memory_limit_of_the_control_group(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    machine = host.memory_bytes()[1]
    (tmp_path / "memory.max").write_text("1048576\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "memory.stat").write_text("anon 700000\nactive_file 200000\ninactive_file 100000\n")
    assert host.memory_bytes() == (348576, 1048576)  # files in the page cache are given back on demand
    (tmp_path / "memory.max").write_text("max\n")
    assert host.memory_bytes()[1] == machine


@no_cuda
def test_without_a_device_the_cpu_is_found_and_cuda_refused() -> None:
    assert detect_backend(BackendConfig()).name == "cpu"
    with pytest.raises(ConfigError, match="backend_type: cpu"):
        detect_backend(BackendConfig(backend_type="cuda"))


def test_a_device_id_that_is_not_there(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="found 7, but the CUDA devices are 0 to 1"):
        detect_backend(BackendConfig(backend_type="cuda", device_ids=[7]))


def test_a_device_id_of_the_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="found 1, but the device is the CPU.*leave it out"):
        detect_backend(BackendConfig(backend_type="cpu", device_ids=[1]))


def test_threads_and_kernels_of_a_cuda_device_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="found 4, but it is the CPU's and the device is CUDA: leave it out"):
        detect_backend(BackendConfig(threads=4))
    with pytest.raises(ConfigError, match="backend.cpu_kernels: found torch"):
        detect_backend(BackendConfig(cpu_kernels="torch"))


def test_torchs_operations_can_be_asked_for() -> None:
    backend = detect_backend(BackendConfig(backend_type="cpu", cpu_kernels="torch"))
    assert type(backend) is CPUBackend
    assert not backend.capability.kernels


@pytest.mark.parametrize(
    ("given", "found"), [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)]
)
def test_openmp_spins_less_unless_the_user_chose(monkeypatch, given, found) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    detect_backend(BackendConfig(backend_type="cpu", threads=1))
    assert os.environ.get("GOMP_SPINCOUNT") == found
