"""What a decoder is, read from config.json: dimensions, position encoding, biases and norms. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..errors import CheckpointError, NotAvailableError

Family = Literal["llama", "mistral", "qwen2", "qwen3", "null"]
RopeKind = Literal["default", "linear", "llama3", "yarn"]

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position encoding. The fields after `factor` belong to the kinds llama3 and yarn."""

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Everything that shapes a decoder. `dtype` is the checkpoint's element type, None where config.json names none."""

    family: Family
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_seq_len: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    dtype: str | None = None
    sliding_window: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_parameters(self) -> int:
        """Weights of all matrices; biases and norms are left out."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * (attention + mlp) + embeddings


def parse_architecture(data: dict[str, Any], where: str = "config.json") -> DecoderConfig:
    """Read the content of a Hugging Face config.json, as transformers 4 or 5 write it.

    Raises:
        NotAvailableError: a model family, rope scaling, activation or quantization that this version cannot run.
        CheckpointError: a value is missing or impossible.
    """
    family = data.get("model_type")
    if family not in ("llama", "mistral", "qwen2", "qwen3"):
        raise NotAvailableError(
            f"{where}: model_type {family!r} is not available yet; use a llama, mistral, qwen2 or qwen3 model"
        )
    if data.get("quantization_config") is not None:
        raise NotAvailableError(f"{where}: quantized checkpoints are not available yet; use the unquantized model")
    if data.get("hidden_act", "silu") != "silu":
        raise NotAvailableError(f"{where}: hidden_act {data['hidden_act']!r} is not available yet; use silu")

    num_heads = _positive(data, "num_attention_heads", where)
    hidden_size = _positive(data, "hidden_size", where)
    num_kv_heads = _positive(data, "num_key_value_heads", where, default=num_heads)
    head_dim = _positive(data, "head_dim", where, default=128 if family == "qwen3" else hidden_size // num_heads)
    if num_heads % num_kv_heads or head_dim % 2:
        raise CheckpointError(
            f"{where}: {num_heads} attention heads, {num_kv_heads} key-value heads and head_dim {head_dim} do not fit: "
            "the first must be a multiple of the second and head_dim must be even"
        )
    max_seq_len = _positive(data, "max_position_embeddings", where)
    attention_bias = bool(data.get("attention_bias", False)) and family in ("llama", "qwen3")
    rope = _parse_rope(data, max_seq_len, where)
    if rope.kind == "yarn":  # such a config may still name the context before the extension
        max_seq_len = max(max_seq_len, int(rope.factor * rope.original_max_position))
    dtype = data.get("dtype") or data.get("torch_dtype")
    if dtype is not None and dtype not in _DTYPES:
        raise NotAvailableError(f"{where}: dtype {dtype!r} is not available yet; use one of {', '.join(_DTYPES)}")
    return DecoderConfig(
        family=family,
        num_layers=_positive(data, "num_hidden_layers", where),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_size=hidden_size,
        intermediate_size=_positive(data, "intermediate_size", where),
        vocab_size=_positive(data, "vocab_size", where),
        max_seq_len=max_seq_len,
        rms_norm_eps=float(data.get("rms_norm_eps", 1e-6)),
        rope=rope,
        qkv_bias=attention_bias or family == "qwen2",
        output_bias=attention_bias,
        mlp_bias=bool(data.get("mlp_bias", False)) and family == "llama",
        qk_norm=family == "qwen3",
        tie_word_embeddings=bool(data.get("tie_word_embeddings", False)),
        dtype=dtype,
        sliding_window=_sliding_window(data, family),
        eos_token_ids=parse_token_ids(data.get("eos_token_id"), f"{where}: eos_token_id"),
    )


def parse_token_ids(value: Any, where: str) -> tuple[int, ...]:
    """An id, a list of ids or null, as configuration files hold them.

    Raises:
        CheckpointError: it is something else.
    """
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise CheckpointError(f"{where}: found {value!r}, expected a token id or a list of token ids")
    return tuple(ids)


def refuse_sliding_window(config: DecoderConfig, where: str) -> None:
    """Refuse a model whose attention window is smaller than its context: computed in full it would give other tokens.

    Raises:
        NotAvailableError: the window would cut something off.
    """
    window = config.sliding_window
    if window is not None and config.max_seq_len > window:
        raise NotAvailableError(
            f"{where}: sliding-window attention ({window} tokens) is not available yet; "
            f"set model.max_seq_len to {window} or less, where it changes nothing"
        )


def _sliding_window(data: dict[str, Any], family: str) -> int | None:
    window = data.get("sliding_window")
    if window is None or family == "llama":
        return None
    if family != "mistral":
        full_layers = data.get("max_window_layers", 28)
        if not data.get("use_sliding_window", False) or full_layers >= data["num_hidden_layers"]:
            return None
    return int(window)


def _positive(data: dict[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = data.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{where}: {key} is {value!r}, expected a positive integer")
    return value


def _parse_rope(data: dict[str, Any], max_seq_len: int, where: str) -> RopeConfig:
    scaling = data.get("rope_scaling") or data.get("rope_parameters") or {}
    theta = float(scaling.get("rope_theta") or data.get("rope_theta") or 10_000.0)
    kind: Any = scaling.get("rope_type") or scaling.get("type") or "default"
    if scaling.get("partial_rotary_factor", data.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise NotAvailableError(f"{where}: partial_rotary_factor is not available yet; use a model without it")
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise NotAvailableError(
            f"{where}: rope type {kind!r} is not available yet; use default, linear, llama3 or yarn"
        )
    if kind == "default":
        return RopeConfig(theta=theta)
    original = int(
        data.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings") or max_seq_len
    )
    factor = scaling.get("factor")
    if factor is None and kind == "yarn":
        factor = max_seq_len / original
    if not isinstance(factor, int | float):
        raise CheckpointError(f"{where}: rope scaling {kind!r} has factor {factor!r}, expected a number")
    optional = {
        key: scaling[key]
        for key in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate", "attention_factor",
                    "mscale", "mscale_all_dim")
        if scaling.get(key) is not None
    }  # fmt: skip
    return RopeConfig(theta=theta, kind=kind, factor=float(factor), original_max_position=original, **optional)
