"""What `sagellm run` says when there is nothing to do, or nothing to read."""

import subprocess
import sys
from pathlib import Path

import pytest

PIPELINE = """\
engine: {model: {model_id: "builtin:null"}}
operators:
  read: {type: jsonl_source, path: in.jsonl}
  tokenize: {}
  schedule: {}
  prefill: {}
  decode: {}
  detokenize: {}
  metrics: {}
  write: {type: jsonl_sink, path: out.jsonl}
  dead: {type: jsonl_sink, path: dead.jsonl}
edges:
  - read -> tokenize -> schedule -> prefill -> decode -> detokenize -> metrics -> write
  - "*.error -> dead"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text(PIPELINE)
    (tmp_path / "in.jsonl").write_text('{"prompt_tokens": [1, 2], "max_tokens": 3}\nnot json\n')
    return tmp_path


def run() -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from sageLLM.cli.main import main; main()", "run", "p.yaml"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_second_run_says_that_all_is_there_and_shows_no_figures_of_nothing(folder: Path) -> None:
    assert run().stderr.splitlines()[-1] == "done 1  error 1"
    result = run()
    assert result.returncode == 0
    assert result.stderr.splitlines()[-1] == "2 lines stood in the output already"
    assert "TTFT ms" not in result.stderr


def test_kv_that_was_not_exported_is_told(folder: Path) -> None:
    engine = "kv_cache: {block_size: 4, enable_tiering: true, nvme_tokens: 8, nvme_path: kv}, "
    pipeline = PIPELINE.replace("engine: {", "engine: {inference_mode: prefill_only, " + engine)
    pipeline = pipeline.replace("  decode:", "  kv_commit: {}\n  decode:")
    (folder / "p.yaml").write_text(pipeline.replace("-> decode", "-> kv_commit -> decode"))
    (folder / "in.jsonl").write_text('{"prompt_tokens": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]}\n')
    assert run().stderr.splitlines()[-1] == "done 1  1 KV blocks not exported"


def test_a_missing_input_is_told_before_the_model_is_loaded(folder: Path) -> None:
    (folder / "in.jsonl").unlink()
    result = run()
    assert result.returncode == 78
    assert result.stderr == f"in.jsonl: no such file, but 'read' reads it (looked for {folder / 'in.jsonl'})\n"
