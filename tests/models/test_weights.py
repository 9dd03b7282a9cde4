"""Checkpoints as they come: sharded, tied, of another dtype, torn, incomplete; and random weights."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sageLLM.backends.torch_ops import TorchBackend
from sageLLM.errors import CheckpointError


@pytest.fixture
def folder(checkpoint_folder, tmp_path):
    """A copy of a checkpoint that the test may change."""
    shutil.copytree(checkpoint_folder("qwen2"), tmp_path / "model")
    return tmp_path / "model"


def logits(model, paged_runner):
    runner = paged_runner(model)
    return runner.step([(runner.add(), [5, 6, 7, 8])])


def test_shards_are_the_same_model_as_one_file(folder, load, paged_runner):
    whole = logits(load(folder), paged_runner)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {name: f"model-{index % 3}.safetensors" for index, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == shard}, folder / shard)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(logits(load(folder), paged_runner), whole)

    (folder / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors"):
        load(folder)


def test_every_misfit_is_named_at_once(folder, load):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.ones(3)
    tensors["model.layers.0.extra"] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as info:
        load(folder)
    for line in (
        "missing: model.layers.1.mlp.up_proj.weight (112, 64)",
        "unexpected: model.layers.0.extra (1,)",
        "wrong shape: model.norm.weight is (3,), config.json says (64,)",
    ):
        assert line in str(info.value)


def test_an_old_checkpoints_extras_are_no_misfit(folder, load, paged_runner):
    whole = logits(load(folder), paged_runner)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # tied: the embedding counts
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(logits(load(folder), paged_runner), whole)


@pytest.mark.parametrize("keep", [4, 100, -1000])
def test_a_torn_file_is_an_error_that_names_it(keep, folder, load):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(folder)


def test_the_dtype_asked_for_is_the_dtype_of_weights_and_kv(folder, load, paged_runner):
    model = load(folder, TorchBackend(torch.device("cpu")), dtype="bfloat16")
    assert model.kv_dtype == torch.bfloat16
    exact = logits(load(folder), paged_runner)
    assert float((logits(model, paged_runner) - exact).abs().max()) < 0.05 * float(exact.abs().max())


def test_random_weights_depend_on_the_seed_only(folder, load, paged_runner):
    fields = {"load_format": "dummy"}
    first, again = load(folder, **fields), load(folder, **fields)
    assert torch.equal(logits(first, paged_runner), logits(again, paged_runner))
    other = load(folder, seed=1, **fields)
    assert not torch.equal(logits(first, paged_runner), logits(other, paged_runner))
    embedding = first._embedding
    assert abs(float(embedding.std()) - 0.02) < 0.001
    assert abs(float(embedding.mean())) < 0.001
