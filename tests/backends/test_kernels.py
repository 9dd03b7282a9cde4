"""Our own kernels: how they are found, what they refuse, and what they do with values that are no numbers."""

from __future__ import annotations

import logging
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from sageLLM.backends.cpu import AVX512Backend, CPUBackend, kernels, make_cpu_backend

from .conftest import StepBuilder, needs_kernels

NATIVE = Path(kernels.__file__).parent / "native"


@pytest.fixture
def library_in(monkeypatch, tmp_path):
    """A function that builds a C text as the library that is found, or has none found."""

    def put(text: str | None) -> None:
        if text is not None:
            (tmp_path / "k.c").write_text(text)
            subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "_native.so", tmp_path / "k.c"], check=True)
        monkeypatch.setattr(kernels, "__file__", str(tmp_path / "kernels.py"))
        kernels.load_library.cache_clear()

    yield put
    kernels.load_library.cache_clear()


EXPORTS = "".join(f"long {name}(void) {{ return {kernels.ABI}; }}\n" for name in kernels._SIGNATURES)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "were not compiled"),
        (EXPORTS.replace(f"return {kernels.ABI}", "return 1"), "another version's sources"),
        ("long sagellm_abi(void) { return 3; }", "cannot be loaded"),
        (EXPORTS + "void nowhere(void); void use(void) { nowhere(); }", "cannot be loaded"),
    ],
    ids=["none", "older", "incomplete", "unresolved"],
)
def test_without_usable_kernels_torch_computes_and_a_warning_says_why(library_in, text, reason, caplog) -> None:
    library_in(text)
    with pytest.raises(kernels.KernelsUnavailable, match=reason):
        kernels.load_library()
    with caplog.at_level(logging.WARNING):
        assert type(make_cpu_backend()) is CPUBackend
    assert (reason in caplog.text) == torch.cpu._is_avx512_bf16_supported()


@pytest.mark.skipif(shutil.which("gcc") is None or shutil.which("objdump") is None, reason="no C compiler")
def test_the_compiler_keeps_the_whole_tile_configuration(tmp_path) -> None:
    """On a machine without AMX too: GCC 12 once dropped all but the first byte, and every use was an illegal one."""
    flags = ["-O3", "-mavx512bf16", "-mavx512vl", "-mavx512bw", "-mamx-tile", "-mamx-bf16", "-c"]
    built = subprocess.run(["gcc", *flags, NATIVE / "amx.c", "-o", tmp_path / "amx.o"], capture_output=True)
    if built.returncode:
        pytest.skip("this compiler knows no AMX")
    code = subprocess.run(["objdump", "-d", tmp_path / "amx.o"], capture_output=True, text=True, check=True).stdout
    begin = code.split("<amx_begin>:")[1].split("ldtilecfg")[0]
    stores = [line for line in begin.splitlines() if "mov" in line and "(%rsp)" in line]
    assert len(stores) >= 4, begin  # palette, eight row lengths, eight heights


@needs_kernels
def test_inputs_that_a_packed_product_cannot_read_are_refused() -> None:
    linear = kernels.PackedLinear(torch.randn(64, 32).bfloat16(), None, 1)
    for x in (torch.randn(3, 32), torch.randn(3, 30).bfloat16(), torch.randn(2, 3, 32).bfloat16()):
        with pytest.raises(ValueError, match="takes bfloat16"):
            linear(x)
    wide = torch.randn(32, 3).bfloat16()
    assert torch.equal(linear(wide.T), linear(wide.T.contiguous()))


@needs_kernels
def test_what_does_not_suit_the_kernels_is_left_to_torch() -> None:
    """Shapes, strides and dtypes that the protocol allows and the kernels do not read."""
    torch.manual_seed(0)
    ours, torchs = AVX512Backend(), CPUBackend()
    weight = torch.randn(64).bfloat16()
    for x, w in (
        (torch.randn(64).bfloat16(), weight),
        (torch.randn(3, 5, 64).bfloat16(), weight),
        (torch.randn(3, 64).bfloat16(), weight.float()),
        (torch.randn(64, 3).bfloat16().T, weight),
        (torch.randn(3, 8, 64).bfloat16()[:, ::2], torch.randn(4, 64).bfloat16()),
    ):
        assert torch.equal(ours.rms_norm(x, w, 1e-6), torchs.rms_norm(x, w, 1e-6))
    x, residual = torch.randn(3, 64).bfloat16(), torch.randn(3, 64)
    for found, expected in zip(
        ours.add_rms_norm(x, residual.clone(), weight, 1e-6), torchs.add_rms_norm(x, residual.clone(), weight, 1e-6),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(found, expected)
    heads, table = torch.randn(3, 2, 64).bfloat16(), torch.randn(1, 1, 64).bfloat16().expand(3, 1, 64)
    assert torch.equal(ours.apply_rope(heads.clone(), table, table), torchs.apply_rope(heads, table, table))


@needs_kernels
def test_a_plan_refuses_other_queries_than_it_was_made_for() -> None:
    backend, step = AVX512Backend(), StepBuilder(dim=32)([(9, 1), (8, 4)], 1, 0, torch.bfloat16, seed=0)
    plan = backend.plan_attention(step.layout, step.kv, 4)
    with pytest.raises(ValueError, match="planned 5 tokens"):
        backend.attend(step.q[:4], step.k, step.v, step.kv, 0, plan, 1.0)


@needs_kernels
def test_nan_stays_nan() -> None:
    """A broken weight must not come out as fluent text: who sees a NaN becomes one."""
    backend, step = AVX512Backend(), StepBuilder(1, 4, 2, 16, 64)([(64, 64)], 0, 0, torch.bfloat16, seed=0)
    step.k[5] = float("nan")
    plan = backend.plan_attention(step.layout, step.kv, 4)
    out = backend.attend(step.q, step.k, step.v, step.kv, 0, plan, 0.1)
    assert out[5:].isnan().all()
    assert not out[:5].isnan().any()
    gated = kernels.PackedLinear(torch.randn(64, 32).bfloat16(), None, 1, gated=True)
    assert gated(torch.full((1, 32), float("nan")).bfloat16()).isnan().all()


@needs_kernels
def test_a_packed_weight_is_the_only_copy() -> None:
    weight, bias = torch.randn(130, 32).bfloat16(), torch.randn(130).bfloat16()
    packed = kernels.PackedLinear(weight, bias, 1)._weight
    assert packed.shape == (3, 16, 64, 2)
    assert not packed[2, :, 2:].any()
