"""From a model id to a model, or to one clear error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from sageLLM.config import DType, ModelConfig
from sageLLM.errors import CheckpointError, ConfigError, ModelNotFoundError, NotAvailableError
from sageLLM.models.resolve import GenerationDefaults, resolve_model, weights_digest

DIMENSIONS = {"num_layers": 2, "num_heads": 4, "hidden_size": 64, "vocab_size": 100, "max_seq_len": 512}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(checkpoint_folder, tmp_path):
    """A copy of a checkpoint that the test may change."""
    shutil.copytree(checkpoint_folder("llama3"), tmp_path / "model")
    return tmp_path / "model"


def change(path, **values):
    data = json.loads(path.read_text())
    data.update(values)
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def resolve(model_id, **fields):
    return resolve_model(ModelConfig(model_id=str(model_id), **fields))


def test_a_folder(folder):
    model = resolve(folder)
    assert (model.folder, model.weights, model.dtype) == (folder, "safetensors", DType.AUTO)
    assert (model.architecture.family, model.vocab_size, model.max_seq_len) == ("llama", 320, 256)
    assert model.generation.eos_token_ids == (1,)


def test_the_null_model():
    model = resolve("builtin:null", max_seq_len=1000)
    assert (model.weights, model.vocab_size, model.max_seq_len, model.folder) == ("null", 259, 1000, None)


def test_resolving_imports_no_torch():
    code = (
        "import sys; from sageLLM.config import ModelConfig; from sageLLM.models.resolve import resolve_model;"
        "from sageLLM.models.tokenizer import load_tokenizer;"
        "load_tokenizer(resolve_model(ModelConfig(model_id='builtin:null')));"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("model_id", ["no/such", "no-such", "./no-such", "a/b/c", "no such"])
def test_an_id_that_is_nothing_is_one_clear_error(model_id):
    with pytest.raises(ModelNotFoundError, match="no such folder") as info:
        resolve(model_id)
    assert "\n" not in str(info.value)


def test_a_misspelt_builtin_lists_what_there_is():
    with pytest.raises(ModelNotFoundError, match="builtin:null"):
        resolve("builtin:nul")


def test_an_id_that_is_nothing_with_all_dimensions_runs_on_random_weights_and_says_so(caplog):
    model = resolve("my/experiment", **DIMENSIONS)
    assert (model.weights, model.vocab_size, model.max_seq_len) == ("dummy", 100, 512)
    assert "RANDOM weights" in caplog.text
    assert resolve("my/experiment", seed=1, **DIMENSIONS).fingerprint != model.fingerprint


@pytest.mark.parametrize("absent", DIMENSIONS)
def test_one_dimension_short_is_no_model(absent):
    dimensions = {key: value for key, value in DIMENSIONS.items() if key != absent}
    with pytest.raises(ModelNotFoundError):
        resolve("my/experiment", **dimensions)


def test_asking_for_safetensors_never_gives_random_weights():
    with pytest.raises(ModelNotFoundError):
        resolve("my/experiment", load_format="safetensors", **DIMENSIONS)


def test_a_hub_id_in_the_cache(folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--some--model"
    commit = "a" * 40
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)

    import huggingface_hub

    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: real(*a, cache_dir=str(tmp_path / "hub"), **k)
    )
    assert resolve("some/model").fingerprint == resolve(folder).fingerprint

    (repository / "snapshots" / commit / "model.safetensors").unlink()
    with pytest.raises((ModelNotFoundError, CheckpointError)):
        resolve("some/model")


@pytest.mark.parametrize("name", ["num_layers", "num_heads", "hidden_size", "vocab_size", "max_seq_len"])
def test_a_dimension_that_contradicts_the_checkpoint_is_refused(name, folder):
    with pytest.raises(ConfigError, match=name):
        resolve(folder, **{name: 999})


def test_a_smaller_context_caps_the_checkpoints(folder):
    assert resolve(folder, max_seq_len=100, num_layers=3).max_seq_len == 100


@pytest.mark.parametrize(
    ("model_id", "given", "found"),
    [
        ("folder", {"revision": "v2"}, "model.revision: found v2, but {} is a folder here: leave it out"),
        ("builtin:pydoc-tiny", {"revision": "v2"}, "model.revision: found v2, but {} is built in: leave it out"),
        ("builtin:null", {"revision": "v2"}, "model.revision: found v2, but {} is built in: leave it out"),
        ("builtin:null", {"load_format": "dummy"}, "model.load_format: found dummy, but {} has no weights"),
        ("builtin:null", {"dtype": "float32"}, "model.dtype: found float32, but {} has no weights"),
        ("builtin:null", {"seed": 3}, "model.seed: found 3, but {} has no weights"),
        ("builtin:pydoc-tiny", {"seed": 3}, "model.seed: found 3, but {} has weights"),
    ],
)
def test_what_means_nothing_to_the_model_is_refused(model_id, given, found, folder):
    model_id = str(folder) if model_id == "folder" else model_id
    with pytest.raises(ConfigError) as raised:
        resolve(model_id, **given)
    assert found.format(model_id) in str(raised.value)
    assert str(raised.value).endswith("leave it out")


def test_a_revision_that_is_not_there_never_gives_random_weights():
    with pytest.raises(ModelNotFoundError):
        resolve("my/experiment", revision="v2", **DIMENSIONS)


def test_dummy_needs_only_config_json(folder):
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    assert resolve(folder, load_format="dummy").weights == "dummy"
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors"):
        resolve(folder)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"do_sample": False, "temperature": 0.7}, GenerationDefaults(temperature=0.0, eos_token_ids=(1,))),
        ({"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
         GenerationDefaults(temperature=0.7, top_k=20, top_p=0.8, eos_token_ids=(1,))),
        ({"do_sample": ..., "repetition_penalty": 1.1}, GenerationDefaults(repetition_penalty=1.1, eos_token_ids=(1,))),
        ({"do_sample": ..., "eos_token_id": [5, 6]}, GenerationDefaults(eos_token_ids=(5, 6))),
        ({"do_sample": ..., "eos_token_id": ...}, GenerationDefaults(eos_token_ids=(1,))),
    ],
)  # fmt: skip
def test_generation_config(written, expected, folder):
    change(folder / "generation_config.json", **written)
    assert resolve(folder).generation == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gpt2"},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        {"partial_rotary_factor": 0.5},
        {"dtype": "float64"},
    ],
)
def test_what_cannot_be_run_is_refused(changes, folder):
    change(folder / "config.json", **changes)
    with pytest.raises(NotAvailableError, match=next(iter(changes)).split("_")[0]):
        resolve(folder)


def test_a_quantized_checkpoint_is_refused(folder):
    change(folder / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(NotAvailableError, match="unquantized"):
        resolve(folder)


def test_a_sliding_window_is_refused_unless_the_context_fits_in_it(folder):
    change(folder / "config.json", model_type="mistral", sliding_window=128)
    with pytest.raises(NotAvailableError, match=r"model\.max_seq_len to 128"):
        resolve(folder)
    assert resolve(folder, max_seq_len=128).max_seq_len == 128


def test_yarn_extends_the_context_that_config_json_still_names(folder):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 1e6}
    change(folder / "config.json", rope_parameters=rope)
    assert resolve(folder).max_seq_len == 1024


def test_rope_as_transformers_4_wrote_it_is_the_same(folder):
    new = resolve(folder).architecture
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    change(folder / "config.json", rope_parameters=..., rope_scaling=rope, rope_theta=theta, dtype=...,
           torch_dtype="float32")  # fmt: skip
    assert resolve(folder).architecture == new


@pytest.mark.parametrize("values", [{"hidden_size": "64"}, {"num_attention_heads": 0}, {"vocab_size": ...}])
def test_an_impossible_config_names_the_field(values, folder):
    change(folder / "config.json", **values)
    with pytest.raises(CheckpointError, match=next(iter(values))):
        resolve(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_an_unreadable_config_is_named(content, folder):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        resolve(folder)


def test_the_fingerprint_changes_with_what_changes_the_output(folder, checkpoint_folder):
    first = resolve(folder).fingerprint
    assert resolve(folder).fingerprint == first == resolve(checkpoint_folder("llama3")).fingerprint
    assert resolve(folder, dtype="bfloat16").fingerprint != first
    assert resolve(folder, load_format="dummy").fingerprint != first
    change(folder / "config.json", rms_norm_eps=1e-3)
    second = resolve(folder).fingerprint
    change(folder / "tokenizer_config.json", chat_template="{{ messages }}")
    assert len({first, second, resolve(folder).fingerprint}) == 3


def test_the_weights_digest_notices_one_byte_anywhere(checkpoint_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint_folder("qwen2"), folder)
    (file,) = folder.glob("*.safetensors")
    data, seen = bytearray(file.read_bytes()), set()
    for at in (None, 5000, len(data) // 3, len(data) - 1):
        if at is not None:
            data[at] ^= 1
        file.write_bytes(data)
        seen.add(weights_digest(resolve_model(ModelConfig(model_id=str(folder)))))
    assert len(seen) == 4
