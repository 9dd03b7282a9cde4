"""Every packing of a weight against the product in float64."""

from __future__ import annotations

import pytest
import torch

from sageLLM.backends.cpu import CPUBackend
from sageLLM.backends.cpu import linear as cpu_linear
from sageLLM.backends.cpu.capability import CPUCapability
from sageLLM.backends.cpu.kernels import PackedLinear
from sageLLM.backends.cpu.linear import HalfLinear, OneDNNLinear, pack_linear
from sageLLM.backends.torch_ops import PlainLinear

from .conftest import needs_kernels

HERE = CPUCapability.probe()
AVX2 = CPUCapability(native_bfloat16=False, half_weights=True, onednn=True)
AVX512 = CPUCapability(native_bfloat16=True, half_weights=True, onednn=True)
OURS = CPUCapability(native_bfloat16=True, half_weights=True, onednn=True, kernels=True)
AMX = CPUCapability(native_bfloat16=True, half_weights=True, onednn=True, kernels=True, amx=True)
ODD = CPUCapability(native_bfloat16=False, half_weights=False, onednn=False)

needs_fbgemm = pytest.mark.skipif(not HERE.half_weights, reason="this torch has no FBGEMM")
needs_onednn_bfloat16 = pytest.mark.skipif(
    not (HERE.onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()), reason="oneDNN has no bfloat16 here"
)
needs_amx = pytest.mark.skipif(not HERE.amx, reason="no AMX, or kernels not compiled")


@pytest.fixture(autouse=True)
def pack_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "SMALL_WEIGHT", 0)


def check(linear, weight, bias, dtype, tolerance) -> None:
    for rows in (1, 2, 3, 7, 16, 65):
        x = torch.randn(rows, weight.shape[1]).to(dtype)
        expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
        out = linear(x)
        assert out.dtype is dtype
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(96, 64), (50, 34), (1, 18)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    ("capability", "checkpoint", "dtype", "kind", "tolerance"),
    [
        pytest.param(AVX2, torch.bfloat16, torch.float32, HalfLinear, 3e-6, marks=needs_fbgemm),
        pytest.param(AVX2, torch.float16, torch.float32, HalfLinear, 3e-6, marks=needs_fbgemm),
        (AVX2, torch.float32, torch.float32, OneDNNLinear, 3e-6),
        pytest.param(AVX512, torch.bfloat16, torch.bfloat16, OneDNNLinear, 0.03, marks=needs_onednn_bfloat16),
        pytest.param(OURS, torch.bfloat16, torch.bfloat16, PackedLinear, 0.03, marks=needs_kernels),
        (AVX2, torch.bfloat16, torch.bfloat16, PlainLinear, 0.03),
        (ODD, torch.bfloat16, torch.float32, PlainLinear, 3e-6),
    ],
)
def test_equals_float64(capability, checkpoint, dtype, kind, tolerance, shape, with_bias) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(shape) / shape[1] ** 0.5).to(checkpoint)
    bias = torch.randn(shape[0]).to(checkpoint) if with_bias else None
    linear = pack_linear(weight, bias, dtype, capability)
    assert type(linear) is kind
    check(linear, weight, bias, dtype, tolerance)


@pytest.mark.parametrize(
    "capability", [pytest.param(OURS, marks=needs_kernels), pytest.param(AMX, marks=needs_amx)], ids=["avx512", "amx"]
)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("outputs", "depth"), [(64, 2), (130, 1030), (200, 3008), (64, 32)])
def test_our_kernel_equals_float64_and_a_row_does_not_depend_on_the_batch(outputs, depth, threads, capability) -> None:
    """Over several depths and chunks of rows; the same bits for a row alone and in any batch."""
    torch.manual_seed(0)
    weight, bias = (torch.randn(outputs, depth) / depth**0.5).bfloat16(), torch.randn(outputs).bfloat16()
    linear = pack_linear(weight, bias, torch.bfloat16, capability, threads)
    x = torch.randn(410, depth).bfloat16()
    together = linear(x)
    torch.testing.assert_close(
        together.double(), torch.nn.functional.linear(x.double(), weight.double(), bias.double()), rtol=0.01, atol=0.01
    )
    for rows in (1, 2, 5, 6, 7, 12, 13, 16, 18, 24, 25, 31, 32, 33, 48, 193, 409):
        assert torch.equal(linear(x[:rows]), together[:rows])
    assert torch.equal(linear(x[::2]), together[::2])  # rows that do not lie close


@needs_kernels
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("inner", [32, 50, 96])
def test_our_gated_kernel_equals_float64(inner, with_bias) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(2 * inner, 64) / 4).bfloat16()
    bias = torch.randn(2 * inner).bfloat16() if with_bias else None
    linear = pack_linear(weight, bias, torch.bfloat16, OURS, gated=True)
    for rows in (1, 6, 65):
        x = torch.randn(rows, 64).bfloat16() * 20  # gates from where silu is zero to where it is the identity
        both = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
        gate, up = both.chunk(2, dim=-1)
        torch.testing.assert_close(linear(x).double(), gate * gate.sigmoid() * up, rtol=0.01, atol=0.01)


def test_what_our_kernel_does_not_take() -> None:
    assert OURS.packs_itself(torch.empty(4, 4), torch.bfloat16)
    assert not OURS.packs_itself(torch.empty(4, 3), torch.bfloat16)
    assert not OURS.packs_itself(torch.empty(4, 4), torch.float32)


@needs_fbgemm
@pytest.mark.parametrize("value", [1e5, 1e-7 * 1.2345])
def test_values_that_float16_cannot_hold_are_kept_in_float32(value) -> None:
    weight = torch.full((8, 16), value, dtype=torch.bfloat16)
    linear = pack_linear(weight, None, torch.float32, AVX2)
    assert type(linear) is not HalfLinear
    check(linear, weight, None, torch.float32, 1e-5 * value)


def test_float32_rows_do_not_depend_on_the_batch() -> None:
    """Bit for bit: a greedy float32 answer is the same alone and in a batch."""
    torch.manual_seed(0)
    linear = pack_linear(torch.randn(160, 96), torch.randn(160), torch.float32, AVX2)
    x = torch.randn(40, 96)
    together = linear(x)
    for rows in (1, 2, 5, 16, 33):
        assert torch.equal(linear(x[:rows]), together[:rows])


def test_backend_packs_in_the_background_and_reports_failure() -> None:
    backend = CPUBackend(AVX2)
    weights = [torch.randn(32, 24) for _ in range(20)]
    linears = [backend.linear(weight, None, torch.float32) for weight in weights]
    for linear, weight in zip(linears, weights, strict=True):
        check(linear, weight, None, torch.float32, 1e-5)
    backend.synchronize()
    broken = backend.linear(torch.randn(4, 4, 4), None, torch.float32)
    with pytest.raises(RuntimeError):
        backend.synchronize()
    with pytest.raises(RuntimeError):
        broken(torch.randn(1, 4))
