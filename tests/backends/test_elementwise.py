"""Norms, rope, activation, block copies and dtypes of every backend against float64."""

from __future__ import annotations

import pytest
import torch

from sageLLM.backends.cpu import AVX512Backend, CPUBackend
from sageLLM.backends.cpu.capability import CPUCapability
from sageLLM.backends.torch_ops import TorchBackend
from sageLLM.config import DType

BACKENDS = {"torch": lambda: TorchBackend(torch.device("cpu")), "cpu": CPUBackend, "avx512": AVX512Backend}
DTYPES = {torch.float32: 3e-6, torch.bfloat16: 6e-2}
ROWS = [1, 3, 40]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> TorchBackend:
    torch.manual_seed(0)
    if request.param == "avx512" and not CPUCapability.probe().kernels:
        pytest.skip("no AVX512-bf16, or kernels not compiled")
    return BACKENDS[request.param]()


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), expected, rtol=DTYPES[dtype], atol=DTYPES[dtype])


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("rows", ROWS)
def test_rms_norm(backend, dtype, eps, rows) -> None:
    x, weight = torch.randn(rows, 96).to(dtype), torch.randn(96).to(dtype)
    close(backend.rms_norm(x, weight, eps), normed(x, weight, eps), dtype)
    assert not backend.rms_norm(torch.zeros_like(x), weight, eps).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_heads(backend, dtype) -> None:
    """A weight for each head, x a part of a packed projection."""
    x, weight = torch.randn(5, 8, 32).to(dtype)[:, :6], torch.randn(6, 32).to(dtype)
    close(backend.rms_norm(x, weight, 1e-6), normed(x, weight, 1e-6), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), [(7, 32), (40, 1024), (3, 20)])
def test_add_rms_norm(backend, dtype, rows, dim) -> None:
    x, residual, weight = torch.randn(rows, dim).to(dtype), torch.randn(rows, dim).to(dtype), torch.randn(dim).to(dtype)
    total = (residual + x).double()
    out, residual = backend.add_rms_norm(x, residual, weight, 1e-6)
    close(residual, total, dtype)
    close(out, normed(total, weight, 1e-6), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dim", [16, 64])
def test_apply_rope(backend, dtype, rows, dim) -> None:
    """A rotation of the pairs (i, i + D/2) as complex numbers; x is a part of a packed projection."""
    x, angle = torch.randn(rows, 8, dim).to(dtype)[:, :6], torch.rand(rows, dim // 2) * 6
    cos, sin = angle.cos(), angle.sin()
    cos, sin = torch.cat((cos, cos), -1).to(dtype)[:, None], torch.cat((-sin, sin), -1).to(dtype)[:, None]
    first, second = x.double().chunk(2, -1)
    turned = torch.complex(first, second) * torch.complex(cos[..., : dim // 2].double(), sin[..., dim // 2 :].double())
    close(backend.apply_rope(x, cos, sin), torch.cat((turned.real, turned.imag), -1), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_silu_and_mul(backend, dtype, rows) -> None:
    x = torch.randn(rows, 48).to(dtype) * 3
    gate, up = x.double().chunk(2, -1)
    close(backend.silu_and_mul(x), gate * gate.sigmoid() * up, dtype)


def test_copy_blocks(backend) -> None:
    kv = backend.allocate_kv((6, 2, 2, 1, 4, 8), torch.float32)
    assert torch.isfinite(kv).all()
    kv.normal_()
    before = kv.clone()
    backend.copy_blocks(kv, [], [])
    assert torch.equal(kv, before)
    backend.copy_blocks(kv, [1, 1, 4], [0, 5, 2])
    assert torch.equal(kv, before[[1, 1, 4, 3, 4, 1]])


def test_compute_dtype() -> None:
    native, emulated = (CPUBackend(CPUCapability(flag, half_weights=True, onednn=True)) for flag in (True, False))
    half, single = torch.bfloat16, torch.float32
    assert native.compute_dtype(DType.AUTO, half) is half
    assert native.compute_dtype(DType.FLOAT32, half) is single
    assert native.compute_dtype(DType.BFLOAT16, single) is half
    assert native.compute_dtype(DType.AUTO, torch.float16) is single
    assert emulated.compute_dtype(DType.AUTO, half) is single
    assert emulated.compute_dtype(DType.BFLOAT16, half) is single
    assert TorchBackend(torch.device("cpu")).compute_dtype(DType.AUTO, half) is half


def test_memory(backend) -> None:
    free, total = backend.memory_bytes()
    assert 0 < free <= total
