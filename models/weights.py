"""Weights into a decoder: memory-mapped safetensors or seeded random ones, one tensor at a time into its place."""

from __future__ import annotations

import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..config import DType
from ..errors import CheckpointError
from .decoder import DecoderLayer, DecoderModel
from .resolve import list_weight_files, read_safetensors_header

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

    from ..backends.base import Backend, Linear
    from .architecture import DecoderConfig
    from .resolve import ResolvedModel

    PackWeight = Callable[[Tensor, Tensor | None, torch.dtype], Linear]

_DUMMY_STD = 0.02
_DUMMY_CHUNK = 1 << 20  # elements drawn from one generator
_EMBEDDING = "model.embed_tokens.weight"
_LM_HEAD = "lm_head.weight"


def load_model(resolved: ResolvedModel, backend: Backend) -> DecoderModel:
    """Build the decoder on the backend's device.

    The peak of memory is the packed model and one packed matrix: tensors come from the mapped files one at a time.

    Raises:
        CheckpointError: tensors are missing, unexpected or of the wrong shape (all are named), or a file is torn.
    """
    config = resolved.architecture
    shapes = expected_tensors(config)
    checkpoint_dtype: torch.dtype = getattr(torch, config.dtype or "float32")
    source: TensorSource
    if resolved.weights == "safetensors" and resolved.folder is not None:
        source = SafetensorsSource(resolved.folder, shapes, tied=config.tie_word_embeddings)
    else:
        source = RandomSource(shapes, resolved.seed, checkpoint_dtype)
    stored = checkpoint_dtype if resolved.dtype is DType.AUTO else getattr(torch, resolved.dtype)
    dtype = backend.compute_dtype(resolved.dtype, checkpoint_dtype)
    with torch.inference_mode(), source:
        return _assemble(config, backend, stored, dtype, source)


def expected_tensors(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a checkpoint of this architecture holds."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {_EMBEDDING: (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes[_LM_HEAD] = (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        for name, rows, columns, bias in (
            ("self_attn.q_proj", q_width, hidden, config.qkv_bias),
            ("self_attn.k_proj", kv_width, hidden, config.qkv_bias),
            ("self_attn.v_proj", kv_width, hidden, config.qkv_bias),
            ("self_attn.o_proj", hidden, q_width, config.output_bias),
            ("mlp.gate_proj", inner, hidden, config.mlp_bias),
            ("mlp.up_proj", inner, hidden, config.mlp_bias),
            ("mlp.down_proj", hidden, inner, config.mlp_bias),
        ):
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        if config.qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes


class TensorSource(Protocol):
    """Where tensors come from. A context manager; a tensor may be a view of a file, mapped as long as it lives."""

    def get(self, name: str) -> Tensor:
        """The tensor of that name, on the CPU, in the dtype it is stored in."""
        ...

    def __enter__(self) -> TensorSource: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class SafetensorsSource:
    """The tensors of a checkpoint's safetensors files, checked against what the architecture expects."""

    def __init__(self, folder: Path, expected: dict[str, tuple[int, ...]], tied: bool) -> None:
        self._files: dict[str, Path] = {}
        self._handles: dict[Path, Any] = {}
        self._stack = ExitStack()
        found: dict[str, tuple[int, ...]] = {}
        for path in list_weight_files(folder):
            try:
                header = json.loads(read_safetensors_header(path))
            except ValueError as error:
                raise CheckpointError(f"{path}: its safetensors header is no JSON: {error}") from error
            for name, entry in header.items():
                if name != "__metadata__":
                    found[name] = tuple(entry["shape"])
                    self._files[name] = path
        problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in found]
        problems += [
            f"unexpected: {name} {shape}"
            for name, shape in found.items()
            if name not in expected and not name.endswith("rotary_emb.inv_freq") and not (tied and name == _LM_HEAD)
        ]
        problems += [
            f"wrong shape: {name} is {found[name]}, config.json says {shape}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ]
        if problems:
            shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
            raise CheckpointError(f"{folder}: the weights do not fit config.json:\n  " + "\n  ".join(shown))

    def __enter__(self) -> SafetensorsSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def get(self, name: str) -> Tensor:
        """See `TensorSource`.

        Raises:
            CheckpointError: the file is torn.
        """
        from safetensors import SafetensorError, safe_open

        path = self._files[name]
        try:
            if path not in self._handles:
                self._handles[path] = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            tensor: Tensor = self._handles[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}; download it again") from error
        return tensor


class RandomSource:
    """Seeded random weights: normal with std 0.02, norms 1, rounded to the checkpoint's dtype.

    A tensor's values depend on the seed and its name only.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], seed: int, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._shapes = shapes
        self._seed = seed
        self._pool = ThreadPoolExecutor(thread_name_prefix="sagellm-random-weights")

    def __enter__(self) -> RandomSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def get(self, name: str) -> Tensor:
        """See `TensorSource`."""
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=self._dtype)
        tensor = torch.empty(shape, dtype=self._dtype)

        @torch.inference_mode()  # a mode of the thread, not of the caller
        def fill(chunk: Tensor, index: int) -> None:
            # The CPU generator uses 32 bits of its seed: hash everything into them.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {name} {index}".encode()))
            chunk.copy_(torch.empty(chunk.shape).normal_(0.0, _DUMMY_STD, generator=generator))

        chunks = torch.split(tensor.view(-1), _DUMMY_CHUNK)
        list(self._pool.map(fill, chunks, range(len(chunks))))
        return tensor


def _assemble(
    config: DecoderConfig, backend: Backend, stored: torch.dtype, dtype: torch.dtype, source: TensorSource
) -> DecoderModel:
    """`stored` is the precision that the weights' values are to have, `dtype` what the backend computes in."""

    def vector(name: str) -> Tensor:
        return source.get(name).to(stored).to(backend.device, dtype)

    def head_norms(attention: str) -> Tensor:
        q_norm, k_norm = vector(attention + "q_norm.weight"), vector(attention + "k_norm.weight")
        return torch.cat((q_norm.expand(config.num_heads, -1), k_norm.expand(config.num_kv_heads, -1)))

    def linear(*names: str, bias: bool, pack: PackWeight = backend.linear) -> Linear:
        return pack(
            _pack([name + ".weight" for name in names], source, stored),
            _pack([name + ".bias" for name in names], source, stored) if bias else None,
            dtype,
        )

    embedding = source.get(_EMBEDDING).to(stored)
    head = embedding if config.tie_word_embeddings else source.get(_LM_HEAD).to(stored)
    lm_head = backend.linear(head, None, dtype)
    layers: list[DecoderLayer] = []
    input_norms = [vector(f"model.layers.{index}.input_layernorm.weight") for index in range(config.num_layers)]
    input_norms.append(vector("model.norm.weight"))
    for index in range(config.num_layers):
        attention, mlp = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."
        layers.append(
            DecoderLayer(
                input_norm=input_norms[index],
                qkv=linear(attention + "q_proj", attention + "k_proj", attention + "v_proj", bias=config.qkv_bias),
                qk_norm=head_norms(attention) if config.qk_norm else None,
                output=linear(attention + "o_proj", bias=config.output_bias),
                mlp_norm=vector(f"model.layers.{index}.post_attention_layernorm.weight"),
                gated=linear(mlp + "gate_proj", mlp + "up_proj", bias=config.mlp_bias, pack=backend.gated_linear),
                down=linear(mlp + "down_proj", bias=config.mlp_bias),
                next_norm=input_norms[index + 1],
            )
        )
    backend.synchronize()
    return DecoderModel(config, backend, dtype, embedding.to(backend.device), layers, lm_head)


def _pack(names: list[str], source: TensorSource, dtype: torch.dtype) -> Tensor:
    """Stack tensors along their first dimension, converting each on its way into the result."""
    first = source.get(names[0])
    if len(names) == 1:
        return first.to(dtype)
    rest = [source.get(name) for name in names[1:]]
    rows = sum(tensor.shape[0] for tensor in (first, *rest))
    packed = torch.empty((rows, *first.shape[1:]), dtype=dtype)
    at = 0
    for tensor in (first, *rest):
        packed[at : at + tensor.shape[0]].copy_(tensor)
        at += tensor.shape[0]
    return packed
