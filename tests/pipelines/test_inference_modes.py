"""PREFILL_ONLY and DECODE_ONLY: one engine computes prompts, another one goes on from their KV."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from sageLLM import GenerateRequest, SageLLMConfig, SageLLMEngine
from sageLLM.errors import ConfigError
from sageLLM.graph import load_pipeline
from sageLLM.records import Pooling, Request, SamplingParams

YAML = """\
engine:
  model: {model_id: builtin:pydoc-tiny, dtype: float32}
  backend: {backend_type: cpu, threads: 1}
  kv_cache: {max_tokens: 4096, enable_tiering: true, nvme_tokens: 65536, nvme_path: kv}
operators:
  read: {type: jsonl_source, path: in.jsonl}
  tokenize: {}
  kv_lookup: {}
  schedule: {}
  prefill: {}
  kv_commit: {}
  decode: {}
  detokenize: {}
  write: {type: jsonl_sink, path: "${output}"}
  dead: {type: jsonl_sink, path: dead.jsonl}
vars: {output: out.jsonl}
edges:
  - read -> tokenize -> kv_lookup -> schedule -> prefill -> kv_commit -> decode -> detokenize -> write
  - "*.error -> dead"
"""
PROMPTS = ["What does heapq.heappush do? " * 8, "How do I sort a list? " * 9, "Hi"]


@pytest.fixture
def run_mode(tmp_path):
    """`run_mode("decode_only", ...)` is `sagellm run` with that mode, in a process of its own: its lines."""
    (tmp_path / "p.yaml").write_text(YAML)
    lines = [{"prompt": prompt, "max_new_tokens": 12, "temperature": 0, "ignore_eos": True} for prompt in PROMPTS]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def run(mode, *settings):
        command = [sys.executable, "-c", "from sageLLM.cli.main import main; main()", "run", "p.yaml", "--quiet"]
        sets = (f"output={mode}.jsonl", f"engine.inference_mode={mode}", *settings)
        subprocess.run(
            [*command, *(part for each in sets for part in ("--set", each))], cwd=tmp_path, check=True, timeout=100
        )
        return [json.loads(line) for line in (tmp_path / f"{mode}.jsonl").read_text().splitlines()]

    return run


def by_line(results):
    return {result["src"]["line"]: result["output_tokens"] for result in results}


def plain():
    """What an ordinary engine says, by line."""
    config = SageLLMConfig(model={"dtype": "float32"}, backend={"backend_type": "cpu", "threads": 1})
    calls = [GenerateRequest(prompt=prompt, max_new_tokens=12, temperature=0.0, ignore_eos=True) for prompt in PROMPTS]
    with SageLLMEngine(config) as engine:
        return {line: output.output_tokens for line, output in enumerate(engine.generate(calls), 1)}


def test_two_processes_tell_what_one_does(run_mode, tmp_path):
    expected = plain()
    prefilled = run_mode("prefill_only")
    assert by_line(prefilled) == {line: tokens[:1] for line, tokens in expected.items()}
    assert {result["finish_reason"] for result in prefilled} == {"length"}
    assert len([*(tmp_path / "kv").rglob("*.kv")]) == sum(
        result["usage"]["prompt_tokens"] // 16 for result in prefilled
    )
    decoded = run_mode("decode_only", "engine.scheduler.on_transfer_failure=fail")
    assert by_line(decoded) == expected
    for result in decoded:
        assert result["metrics"]["prefix_hit_tokens"] == (result["usage"]["prompt_tokens"] - 1) // 16 * 16


ENGINE = {"kv_cache": {"max_tokens": 256, "block_size": 4, "enable_tiering": True, "nvme_tokens": 4096}}


@pytest.fixture
def run_null(make_run, tmp_path):
    def run(mode, on_failure="recompute", requests=None, **kv_cache):
        engine = {
            **ENGINE,
            "kv_cache": {**ENGINE["kv_cache"], "nvme_path": str(tmp_path / "kv"), **kv_cache},
            "inference_mode": mode,
            "scheduler": {"on_transfer_failure": on_failure},
        }
        texts = [
            Request(f"r{n}", prompt_tokens=[n] * 11, sampling=SamplingParams(max_new_tokens=5, temperature=0))
            for n in range(4)
        ]
        return make_run(requests or texts, engine)()

    return run


def test_what_is_missing_is_computed_or_fails_its_request(run_null, tmp_path):
    run_null("prefill_only")
    files = sorted((tmp_path / "kv").rglob("*.kv"))
    assert len(files) == 8
    files[3].write_bytes(b"torn")
    assert run_null("decode_only").counts == {"accepted": 4, "done": 4}
    shutil.rmtree(files[5].parent)
    run = run_null("decode_only", "fail")
    assert run.counts == {"accepted": 4, "done": 3, "error": 1} or run.counts == {"accepted": 4, "done": 2, "error": 2}
    assert all("of the prompt are not in kv_cache.nvme_path" in letter.error for letter in run.letters.values())


def test_embeddings_in_both_modes(run_null):
    """Of a prompt whose KV is fetched the last token is computed, and so is all of it where its mean is asked for."""
    last, mean = (
        [Request(f"r{n}", prompt_tokens=[n] * 11, pooling=pooling) for n in range(4)]
        for pooling in (Pooling.LAST, Pooling.MEAN)
    )
    for mode, on_failure, requests, done in (
        ("prefill_only", "fail", mean, 4),
        ("decode_only", "fail", last, 4),
        ("decode_only", "recompute", mean, 4),
        ("decode_only", "fail", mean, 0),
    ):
        run = run_null(mode, on_failure, requests)
        run.check_everyone_had_one_end()
        embedded = [completion for completion in run.completions.values() if completion.embedding is not None]
        assert (len(embedded), run.counts.get("done", 0)) == (done, done)
        if requests is last:
            assert {completion.metrics.prefix_hit_tokens for completion in embedded} == {8}


def test_what_finds_no_room_is_told_by_its_record_and_the_others_are_there(run_null, tmp_path, caplog):
    """Two whole blocks of each of four prompts, and room for five."""
    run = run_null("prefill_only", nvme_tokens=20)
    assert run.counts == {"accepted": 4, "done": 4}
    told = {name: end.metrics.to_dict()["unexported_tokens"] for name, end in run.completions.items()}
    assert sorted(told.values()) == [0, 0, 4, 8]
    assert caplog.text.count("there is no room left to export KV: write more") == 1
    found = run_null("decode_only", nvme_tokens=20).completions
    for name, missing in told.items():
        assert found[name].metrics.prefix_hit_tokens == 8 - missing
        assert "unexported_tokens" not in found[name].metrics.to_dict()


def test_what_finds_no_room_fails_where_that_is_asked_for(run_null):
    run = run_null("prefill_only", "fail", nvme_tokens=20)
    assert run.counts == {"accepted": 4, "done": 2, "error": 2}
    assert sorted(letter.error.split()[0] for letter in run.letters.values()) == ["1", "2"]


def test_nothing_is_given_out_that_was_not_written(run_null, monkeypatch):
    from sageLLM.kv_runtime.tiers import block_file

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(block_file.os, "writev", full)
    run = run_null("prefill_only", "fail")
    assert run.counts == {"accepted": 4, "error": 4}
    assert "2 KV blocks of the prompt could not be exported" in run.letters["r0"].error
    assert run_null("prefill_only").counts == {"accepted": 4, "done": 4}


@pytest.mark.parametrize(
    ("mode", "stage", "what"),
    [("decode_only", "kv_lookup", "imports KV in the stage kv_lookup"), ("prefill_only", "kv_commit", "exports KV in")],
)
def test_a_pipeline_without_the_stage_that_moves_kv_is_refused(tmp_path, mode, stage, what):
    (tmp_path / "p.yaml").write_text(YAML.replace(f"  {stage}: {{}}\n", "").replace(f"{stage} -> ", ""))
    with pytest.raises(ConfigError, match=f"^--set engine.inference_mode={mode}: .*{what}.*add `{stage}:`"):
        load_pipeline(tmp_path / "p.yaml", [f"engine.inference_mode={mode}"])
