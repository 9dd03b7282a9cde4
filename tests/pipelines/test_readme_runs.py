"""What README shows runs: the pipeline, the operator in ten lines, the Python."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def block(language, holding):
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    (found,) = [text for text in blocks if holding in text]
    return found


@pytest.fixture
def run(tmp_path):
    """Run a pipeline on the null model with three questions; returns the answers' texts by line."""

    def run(pipeline, *arguments):
        (tmp_path / "answers.yaml").write_text(pipeline)
        lines = [{"prompt": "hi" * n, "max_new_tokens": 3} for n in (1, 2, 3)]
        (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, "nonsense"]))
        code = "from sageLLM.cli.main import main; main()"
        null = ("--set", "engine.model.model_id=builtin:null")
        command = [sys.executable, "-c", code, "run", "answers.yaml", "--quiet", *null, *arguments]
        done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        (letter,) = map(json.loads, (tmp_path / "dead.jsonl").read_text().splitlines())
        assert letter["line"] == 4
        results = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
        return {result["src"]["line"]: result["text"] for result in results}

    return run


def test_the_pipeline(run):
    assert run(block("yaml", "name: answers")) == {1: "cde", 2: "efg", 3: "ghi"}


def test_what_runs_where(run):
    engine = block("yaml", "mode: strict")
    pipeline = re.sub(r"engine:\n  model:.*\n", lambda found: engine, block("yaml", "name: answers"))
    assert run(pipeline) == {1: "cde", 2: "efg", 3: "ghi"}


def test_the_operator_in_ten_lines(run, tmp_path):
    (tmp_path / "shout.py").write_text(block("python", "# shout.py"))
    pipeline = block("yaml", "name: answers").replace("  metrics: {}\n", "  metrics: {}\n  shout: {}\n")
    pipeline = pipeline.replace("-> detokenize -> metrics", "-> detokenize -> shout -> metrics")
    assert run(pipeline, "--allow-module", "shout") == {1: "CDE", 2: "EFG", 3: "GHI"}


def test_the_python(capsys):
    exec(block("python", "SageLLMEngine"), {})
    assert "Push item onto heap, maintaining the heap invariant." in capsys.readouterr().out
