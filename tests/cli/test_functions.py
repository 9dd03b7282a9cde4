"""Functions of the user's own, by name: `validate` and `run` know which there are before anything starts."""

from __future__ import annotations

import subprocess
import sys

import pytest

PIPELINE = """\
operators:
  read: {type: jsonl_source, path: in.jsonl}
  polite:
    type: map
    function: be_polite
  short: {type: filter, function: is_short}
  tokenize: {}
  schedule: {}
  prefill: {}
  decode: {}
  detokenize: {}
  write: {type: jsonl_sink, path: out.jsonl}
edges:
  - read -> polite -> short -> tokenize -> schedule -> prefill -> decode -> detokenize -> write
  - "*.error -> write"
"""
MODULE = """\
from sageLLM.operators import register_function

@register_function("be_polite")
def be_polite(request):
    request.prompt = f"Please: {request.prompt}"

@register_function("is_short")
def is_short(request):
    return len(request.prompt) < 100
"""


@pytest.fixture
def sagellm(tmp_path):
    """`sagellm("validate", "--allow-module", "mine")` -> (exit code, lines of stderr); no torch must be imported."""
    (tmp_path / "p.yaml").write_text(PIPELINE)
    (tmp_path / "mine.py").write_text(MODULE)
    code = (
        "import sys\n"
        "from sageLLM.cli.main import cli\n"
        "try:\n"
        "    cli(sys.argv[1:])\n"
        "finally:\n"
        "    assert 'torch' not in sys.modules\n"
    )

    def run(verb, *arguments):
        command = [sys.executable, "-c", code, verb, "p.yaml", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr.splitlines()

    return run


def test_registered_by_an_allowed_module_they_are_valid(sagellm):
    assert sagellm("validate", "--allow-module", "mine") == (0, [])


@pytest.mark.parametrize("verb", ["validate", "run"])
def test_each_that_is_not_registered_is_told_with_its_place_and_the_nearest(sagellm, tmp_path, verb):
    written = PIPELINE.replace("be_polite", "be_polit").replace("is_short", "concise")
    (tmp_path / "p.yaml").write_text(written)
    assert sagellm(verb, "--allow-module", "mine") == (
        78,
        [
            "p.yaml:5:15: operator 'polite' (map), field 'function': found 'be_polit', "
            "no function of that name is registered; did you mean 'be_polite'?",
            "p.yaml:6:35: operator 'short' (filter), field 'function': found 'concise', "
            "no function of that name is registered; write one of: be_polite, is_short; "
            "register your own with @register_function, and add --allow-module <its module>",
        ],
    )
    assert not (tmp_path / "out.jsonl").exists()


def test_without_a_module_there_are_none(sagellm):
    code, lines = sagellm("validate")
    assert code == 78
    assert [line.split(": ")[0] for line in lines] == ["p.yaml:5:15", "p.yaml:6:35"]
    assert all(line.endswith("and add --allow-module <its module>") for line in lines)


def test_set_names_itself(sagellm):
    code, lines = sagellm("validate", "--allow-module", "mine", "--set", "operators.short.function=is_shor")
    assert code == 78
    assert lines == [
        "--set operators.short.function=is_shor: operator 'short' (filter), field 'function': found 'is_shor', "
        "no function of that name is registered; did you mean 'is_short'?"
    ]
