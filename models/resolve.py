"""From a model id to what it is and where its files lie. No torch: `sagellm validate` and the null model use this."""

from __future__ import annotations

import hashlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..config import DType
from ..errors import CheckpointError, ConfigError, ModelNotFoundError
from .architecture import DecoderConfig, parse_architecture, parse_token_ids, refuse_sliding_window

if TYPE_CHECKING:
    from ..config import ModelConfig

log = logging.getLogger("sageLLM")

NULL_VOCAB_SIZE = 259  # 256 bytes, beginning of sequence, end of sequence, padding
NULL_EOS_TOKEN_ID = 257
NULL_MAX_SEQ_LEN = 32_768

_BUILTIN_FOLDERS = {"builtin:pydoc-tiny": "pydoc_tiny"}
_NEEDED = ("*.json", "*.safetensors", "*.jinja", "*.txt")
_SHAPES_THE_TEXT = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
                    "generation_config.json")  # fmt: skip
_NOT_NEEDED = ("original/*", "consolidated*", "onnx/*")


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What generation_config.json asks for when a request says nothing. `top_k` 0 is off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model that exists. `fingerprint` changes with anything that could change its output."""

    model_id: str
    folder: Path | None
    architecture: DecoderConfig
    generation: GenerationDefaults
    weights: Literal["safetensors", "dummy", "null"]
    fingerprint: str
    dtype: DType = DType.AUTO
    seed: int = 0

    @property
    def vocab_size(self) -> int:
        return self.architecture.vocab_size

    @property
    def max_seq_len(self) -> int:
        return self.architecture.max_seq_len


def resolve_model(config: ModelConfig) -> ResolvedModel:
    """Find the model: `builtin:...`, a folder, the hub's cache, a download; else random weights of given dimensions.

    Raises:
        ModelNotFoundError: the id is none of these and the dimensions are not all given.
        CheckpointError: the folder lacks files, or they cannot be read.
        ConfigError: a dimension contradicts the checkpoint, or a field means nothing to a model of this kind.
        NotAvailableError: the architecture is one that this version cannot run.
    """
    if config.model_id == "builtin:null":
        return _resolve_null(config)
    try:
        folder = _find_folder(config)
    except ModelNotFoundError as error:
        if config.load_format == "safetensors" or config.revision is not None or _dimensions_missing(config):
            raise
        return _resolve_random(config, str(error))
    return _resolve_folder(config, folder)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint's file.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: found {type(data).__name__}, expected an object")
    return data


def list_weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the index's shards, or the single file; empty if there is neither.

    Raises:
        CheckpointError: the index cannot be read or names files that do not exist.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: no `weight_map`")
        files = [folder / name for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise CheckpointError(f"{index}: names shards that are not in the folder: {', '.join(missing)}")
        return files
    single = folder / "model.safetensors"
    return [single] if single.exists() else []


def read_safetensors_header(path: Path) -> bytes:
    """The JSON header of a safetensors file.

    Raises:
        CheckpointError: the file is too short to hold the header it announces.
    """
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > path.stat().st_size - 8:
            raise CheckpointError(f"{path}: not a whole safetensors file; download it again")
        return file.read(length)


def _resolve_null(config: ModelConfig) -> ResolvedModel:
    _refuse(config, "revision", None, "is built in")
    _refuse(config, "load_format", "auto", "has no weights")
    _refuse(config, "dtype", DType.AUTO, "has no weights")
    _refuse(config, "seed", 0, "has no weights")
    architecture = DecoderConfig(
        family="null", num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, hidden_size=2, intermediate_size=2,
        vocab_size=NULL_VOCAB_SIZE, max_seq_len=NULL_MAX_SEQ_LEN, eos_token_ids=(NULL_EOS_TOKEN_ID,),
    )  # fmt: skip
    architecture = _apply_dimensions(config, architecture)
    generation = GenerationDefaults(eos_token_ids=architecture.eos_token_ids)
    return ResolvedModel(config.model_id, None, architecture, generation, "null", "null", config.dtype, config.seed)


def _resolve_random(config: ModelConfig, reason: str) -> ResolvedModel:
    num_layers, num_heads, hidden_size, vocab_size, max_seq_len = (
        value or 0
        for value in (config.num_layers, config.num_heads, config.hidden_size, config.vocab_size, config.max_seq_len)
    )
    if hidden_size % (2 * num_heads):
        raise ConfigError(
            f"model.hidden_size {hidden_size} must be a multiple of twice model.num_heads ({num_heads}): "
            f"write {-(-hidden_size // (2 * num_heads)) * 2 * num_heads}"
        )
    architecture = DecoderConfig(
        family="llama", num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads, hidden_size=hidden_size,
        intermediate_size=-(-hidden_size * 8 // 3 // 16) * 16, vocab_size=vocab_size, max_seq_len=max_seq_len,
        dtype="float32",
    )  # fmt: skip
    log.warning(
        "WARNING: RANDOM weights (seed %d) for model %r, so the output has no meaning: its five dimensions are given, "
        "and it does not exist (%s)",
        config.seed, config.model_id, reason,
    )  # fmt: skip
    fingerprint = _digest([repr(architecture).encode()], config, "dummy")
    return ResolvedModel(
        config.model_id, None, architecture, GenerationDefaults(), "dummy", fingerprint, config.dtype, config.seed
    )


def _resolve_folder(config: ModelConfig, folder: Path) -> ResolvedModel:
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(f"{folder}: no config.json; expected a Hugging Face model folder")
    architecture = parse_architecture(read_json(path), str(path))
    content = [path.read_bytes()]

    weights: Literal["safetensors", "dummy"] = "dummy"
    if config.load_format != "dummy":
        weights = "safetensors"
        _refuse(config, "seed", 0, "has weights, and only random ones come from a seed (a request's `seed` is another)")
        files = list_weight_files(folder)
        if not files:
            raise CheckpointError(
                f"{folder}: neither model.safetensors nor model.safetensors.index.json; "
                "convert the weights to safetensors, or set model.load_format to dummy for random weights"
            )
        headers = [read_safetensors_header(file) for file in files]
        content += headers
        content += [str(file.stat().st_size).encode() for file in files]
        if architecture.dtype is None:
            architecture = replace(architecture, dtype=_stored_dtype(headers[0]))

    defaults = _read_generation_config(folder, architecture)
    content += [(folder / name).read_bytes() for name in _SHAPES_THE_TEXT if (folder / name).exists()]
    architecture = _apply_dimensions(config, architecture)
    refuse_sliding_window(architecture, str(path))
    return ResolvedModel(
        config.model_id, folder, architecture, defaults, weights, _digest(content, config, weights),
        config.dtype, config.seed,
    )  # fmt: skip


def _find_folder(config: ModelConfig) -> Path:
    model_id = config.model_id
    if model_id.startswith("builtin:"):
        if model_id not in _BUILTIN_FOLDERS:
            known = ", ".join(sorted((*_BUILTIN_FOLDERS, "builtin:null")))
            raise ModelNotFoundError(f"{model_id}: no such built-in model; there are {known}")
        _refuse(config, "revision", None, "is built in")
        return Path(__file__).parent / "builtin" / _BUILTIN_FOLDERS[model_id]
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        _refuse(config, "revision", None, "is a folder here")
        return folder
    if model_id.startswith((".", "/", "~")) or model_id.count("/") > 1:
        raise ModelNotFoundError(f"{model_id}: no such folder")
    return _find_on_hub(config)


def _find_on_hub(config: ModelConfig) -> Path:
    """The newest cached snapshot if it is whole, else a download."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = [p for p in _NEEDED if config.load_format != "dummy" or p != "*.safetensors"]

    def snapshot(local_files_only: bool) -> Path:
        found = snapshot_download(
            config.model_id,
            revision=config.revision,
            allow_patterns=patterns,
            ignore_patterns=list(_NOT_NEEDED),
            local_files_only=local_files_only,
        )
        return Path(found)

    try:
        cached = snapshot(local_files_only=True)
        if _is_whole(cached, config.load_format == "dummy"):
            return cached
    except HFValidationError as error:
        raise ModelNotFoundError(f"{config.model_id}: no such folder, and not a hub id") from error
    except (LocalEntryNotFoundError, FileNotFoundError):
        pass
    try:
        return snapshot(local_files_only=False)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise ModelNotFoundError(
            f"{config.model_id}: no such folder, not in the hub's cache, and it cannot be downloaded ({first_line}); "
            "write the path of a model folder, or fetch the model where there is a network"
        ) from error


def _is_whole(folder: Path, without_weights: bool) -> bool:
    if not (folder / "config.json").exists():
        return False
    try:
        return without_weights or bool(list_weight_files(folder))
    except CheckpointError:
        return False


def _refuse(config: ModelConfig, name: str, default: object, why: str) -> None:
    """Refuse a field that was given although it means nothing to this model."""
    value = getattr(config, name)
    if value != default:
        raise ConfigError(f"model.{name}: found {value}, but {config.model_id} {why}: leave it out")


def _dimensions_missing(config: ModelConfig) -> bool:
    return None in (config.num_layers, config.num_heads, config.hidden_size, config.vocab_size, config.max_seq_len)


def _apply_dimensions(config: ModelConfig, architecture: DecoderConfig) -> DecoderConfig:
    for name in ("num_layers", "num_heads", "hidden_size", "vocab_size"):
        asked, real = getattr(config, name), getattr(architecture, name)
        if asked not in (None, real):
            raise ConfigError(f"model.{name} is {asked}, but {config.model_id} has {real}: leave it out")
    if config.max_seq_len is None:
        return architecture
    if config.max_seq_len > architecture.max_seq_len:
        raise ConfigError(
            f"model.max_seq_len is {config.max_seq_len}, but {config.model_id} goes to {architecture.max_seq_len}: "
            "write that or less, or leave it out"
        )
    return replace(architecture, max_seq_len=config.max_seq_len)


def _read_generation_config(folder: Path, architecture: DecoderConfig) -> GenerationDefaults:
    path = folder / "generation_config.json"
    if not path.exists():
        return GenerationDefaults(eos_token_ids=architecture.eos_token_ids)
    data = read_json(path)

    def number(key: str, default: float) -> float:
        value = data.get(key)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise CheckpointError(f"{path}: {key} is {value!r}, expected a number")
        return value

    return GenerationDefaults(
        temperature=0.0 if data.get("do_sample") is False else float(number("temperature", 1.0)),
        top_k=int(number("top_k", 0)),
        top_p=float(number("top_p", 1.0)),
        repetition_penalty=float(number("repetition_penalty", 1.0)),
        eos_token_ids=parse_token_ids(data.get("eos_token_id"), f"{path}: eos_token_id") or architecture.eos_token_ids,
    )


def _stored_dtype(header: bytes) -> str:
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    stored = [entry["dtype"] for name, entry in json.loads(header).items() if name != "__metadata__"]
    return next((names[dtype] for dtype in stored if dtype in names), "float32")


def _digest(content: list[bytes], config: ModelConfig, weights: str) -> str:
    digest = hashlib.sha256(f"{weights} {config.seed if weights == 'dummy' else 0} {config.dtype}".encode())
    for part in content:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:32]


def weights_digest(model: ResolvedModel) -> str:
    """A hash of every byte of a checkpoint's weights: reads all files, as many at once as there are processors.

    Raises:
        CheckpointError: a weight file cannot be read.
    """
    digest = hashlib.sha256(model.fingerprint.encode())
    if model.folder is not None and model.weights == "safetensors":
        with ThreadPoolExecutor() as threads:
            for part in threads.map(_file_digest, list_weight_files(model.folder)):
                digest.update(part)
    return digest.hexdigest()


def _file_digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
