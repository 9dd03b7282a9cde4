"""The compiled kernels of `native/`, called through ctypes: bfloat16 on a processor with AVX512-bf16.

They are built with the package where there is a C compiler. Calls let go of the interpreter's lock, and share the
OpenMP threads that torch has (its library must be loaded first: the kernels take their symbols from it).
Shape letters: T tokens of a step, S sequences in it, H query heads, K kv heads, D head dim, N blocks of the pool,
L layers, P tokens of a block.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .memory import ask_huge_pages

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ..base import StepLayout

ABI = 3  # of native/tile.h
PANEL = 64  # outputs of a packed weight that lie together
AMX_PAIRS = 16  # pairs of inputs that AMX takes at once
MAX_ROWS = 64  # queries times heads that one task of attention takes
MAX_HEAD_DIM = 256

_POINTER, _LONG = ctypes.c_void_p, ctypes.c_long
_SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "sagellm_abi": ([], _LONG),
    "sagellm_supported": ([], _LONG),
    "sagellm_linear": ([_POINTER, _LONG, *[_POINTER] * 3, *[_LONG] * 7], None),
    "sagellm_attend": ([_POINTER], None),
    "sagellm_rms_norm": (
        [_POINTER, _LONG, _POINTER, _LONG, *[_POINTER] * 2, *[_LONG] * 3, ctypes.c_float, _LONG], None
    ),
    "sagellm_rope": ([_POINTER, _LONG, *[_POINTER] * 2, *[_LONG] * 4], None),
}  # fmt: skip


class KernelsUnavailable(Exception):
    """The compiled kernels cannot be used; the message says why."""


@cache
def load_library() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        KernelsUnavailable: they were not compiled, or are not those that this version calls.
    """
    folder = Path(__file__).parent
    built = (folder / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES)
    path = next((path for path in built if path.exists()), None)
    if path is None:
        raise KernelsUnavailable("they were not compiled when sageLLM was installed, for want of gcc or another reason")
    try:
        library = ctypes.CDLL(str(path))
        for name, (arguments, result) in _SIGNATURES.items():
            function: Any = getattr(library, name)
            function.argtypes, function.restype = arguments, result
    except (OSError, AttributeError) as error:
        raise KernelsUnavailable(f"{path.name} cannot be loaded: {error}") from error
    if library.sagellm_abi() != ABI:
        raise KernelsUnavailable(f"{path.name} was compiled from another version's sources")
    return library


class PackedLinear:
    """A bfloat16 weight in the kernels' layout, [panel][pair of inputs][64 outputs][2]; `in` must be even.

    Sums are in float32, in the order of the inputs whatever the number of rows: a row's result does not depend on the
    others. A gated one takes [2I, in], the gate first, and returns silu(gate) * up, [T, I].
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, threads: int, gated: bool = False, amx: bool = False
    ) -> None:
        outputs, depth = weight.shape
        self._width = outputs // 2 if gated else outputs
        self._gated, self._threads, self._pairs = gated, threads, depth // 2
        self._amx = amx and self._pairs % AMX_PAIRS == 0
        panels = -(-self._width // (PANEL // 2 if gated else PANEL))
        self._weight = ask_huge_pages(torch.empty(panels, self._pairs, PANEL, 2, dtype=torch.bfloat16))
        _fill_panels(self._weight.transpose(1, 2), weight.reshape(outputs, -1, 2), gated)
        self._bias: Tensor | None = None
        if bias is not None:
            self._bias = torch.empty(panels, PANEL)
            _fill_panels(self._bias, bias, gated)
        self._call: Callable[..., None] = load_library().sagellm_linear

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype is not torch.bfloat16 or x.dim() != 2 or x.shape[1] != 2 * self._pairs:
            raise ValueError(f"found {x.dtype} {list(x.shape)}, the product takes bfloat16 [T, {2 * self._pairs}]")
        if x.stride(1) != 1:
            x = x.contiguous()
        rows = x.shape[0]
        out = x.new_empty(rows, self._width)
        bias = None if self._bias is None else self._bias.data_ptr()
        self._call(
            x.data_ptr(), x.stride(0), self._weight.data_ptr(), bias, out.data_ptr(), self._width,
            rows, self._pairs, self._width, self._gated, self._amx, self._threads,
        )  # fmt: skip
        return out


def _fill_panels(panels: Tensor, rows: Tensor, gated: bool) -> None:
    """Copy rows [outputs, ...] to panels [N, 64, ...], the last filled up with zeros; gated: half of each gate, half
    up."""
    panels[-1] = 0
    parts = rows.chunk(2) if gated else (rows,)
    width = PANEL // len(parts)
    for index, part in enumerate(parts):
        full, own = part.shape[0] // width, panels[:, index * width : (index + 1) * width]
        own[:full].copy_(part[: full * width].reshape(full, width, *part.shape[1:]))
        if part.shape[0] % width:
            own[full, : part.shape[0] % width].copy_(part[full * width :])


class _AttentionCall(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("q", "k", "v", "pool", "out")),
        *((name, _POINTER) for name in ("slots", "tables", "contexts", "starts", "first_runs")),
        *((name, ctypes.c_int64) for name in ("q_stride", "k_stride", "v_stride", "block_stride", "width")),
        *((name, ctypes.c_int64) for name in ("sequences", "tokens", "kv_heads", "group", "dim", "block_size")),
        *((name, ctypes.c_int64) for name in ("run_tokens", "threads")),
        ("scale", ctypes.c_float),
    )


class PagedAttention:
    """The attention of one step, planned once for all its layers over a pool [N, L, 2, K, P, D]. For one thread."""

    def __init__(self, layout: StepLayout, kv: Tensor, num_heads: int, threads: int) -> None:
        _, _, _, num_kv_heads, block_size, head_dim = kv.shape
        group = num_heads // num_kv_heads
        run_tokens = max(1, MAX_ROWS // group)
        lengths = torch.tensor([0, *layout.query_lens])
        runs = (lengths + run_tokens - 1) // run_tokens
        arrays = (layout.slots, layout.block_tables, layout.context_lens, lengths.cumsum(0), runs.cumsum(0))
        # The call holds addresses: these are kept as long as it.
        self._arrays = tuple(array.to(torch.int64).contiguous() for array in arrays)
        self._kv = kv
        self._call = call = _AttentionCall()
        pointers = [tensor.data_ptr() for tensor in self._arrays]
        call.slots, call.tables, call.contexts, call.starts, call.first_runs = pointers
        call.block_stride, call.width = kv.stride(0), layout.block_tables.shape[1]
        call.sequences, call.tokens = len(layout.query_lens), layout.slots.shape[0]
        call.kv_heads, call.group, call.dim, call.block_size = num_kv_heads, group, head_dim, block_size
        call.run_tokens, call.threads = run_tokens, threads
        self._attend: Callable[..., None] = load_library().sagellm_attend

    @staticmethod
    def supports(kv: Tensor, num_heads: int) -> bool:
        """Whether the kernel takes a pool of that shape and dtype."""
        head_dim = kv.shape[5]
        fits = head_dim % 32 == 0 and head_dim <= MAX_HEAD_DIM and num_heads <= MAX_ROWS * kv.shape[3]
        return kv.dtype is torch.bfloat16 and kv.is_contiguous() and fits

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float) -> Tensor:
        """See `Backend.attend`."""
        call = self._call
        q, k, v = (x if has_dense_rows(x) else x.contiguous() for x in (q, k, v))
        heads = (call.kv_heads * call.group, call.kv_heads, call.kv_heads)
        if any(x.shape != (call.tokens, n, call.dim) for x, n in zip((q, k, v), heads, strict=True)):
            shapes = [list(x.shape) for x in (q, k, v)]
            raise ValueError(f"found q, k, v {shapes}, planned {call.tokens} tokens, {heads} heads of {call.dim}")
        out = q.new_empty(q.shape)
        call.q, call.k, call.v, call.out = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
        call.pool = self._kv.data_ptr() + layer * self._kv.stride(1) * self._kv.element_size()
        call.q_stride, call.k_stride, call.v_stride, call.scale = q.stride(0), k.stride(0), v.stride(0), scale
        self._attend(ctypes.addressof(call))
        return out


def has_dense_rows(x: Tensor) -> bool:
    """Whether x [T, ...] is bfloat16 and the elements of each token lie close, in order."""
    return x.dtype is torch.bfloat16 and (x.is_contiguous() or x[:1].is_contiguous())


def rms_norm(x: Tensor | None, residual: Tensor, weight: Tensor, eps: float, threads: int) -> Tensor:
    """residual += x (if any), then residual / rms(residual) * weight; x and residual [T, D], or [T, H, D] with a weight
    for each head. D must be a multiple of 16, and a token's elements lie close."""
    out = residual.new_empty(residual.shape)
    load_library().sagellm_rms_norm(
        None if x is None else x.data_ptr(), 0 if x is None else x.stride(0), residual.data_ptr(), residual.stride(0),
        weight.data_ptr(), out.data_ptr(), residual.shape[0], weight.numel() // weight.shape[-1], weight.shape[-1],
        eps, threads,
    )  # fmt: skip
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, threads: int) -> None:
    """`Backend.apply_rope` in place; D must be a multiple of 32."""
    tokens, heads, dim = x.shape
    load_library().sagellm_rope(x.data_ptr(), x.stride(0), cos.data_ptr(), sin.data_ptr(), tokens, heads, dim, threads)
