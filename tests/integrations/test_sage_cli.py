"""`sage llm ...`, as isage finds it; and what is told where isage is missing."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import sage.cli.main

ROOT = Path(__file__).parents[2]
GROUP = "sage.cli.plugins"


@pytest.fixture
def sage_command(monkeypatch, capsys):
    """`sage_command("llm", ...)`: exit code and output of SAGE's command with our pyproject.toml's plug-ins."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = [EntryPoint(name, value, GROUP) for name, value in project["entry-points"][GROUP].items()]
    monkeypatch.setattr(sage.cli.main, "entry_points", lambda group: ours if group == GROUP else [])

    def run(*arguments):
        try:
            code = sage.cli.main.main(arguments)
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        return code or 0, captured.out + captured.err

    return run


def test_sage_llm_reaches_our_verbs(sage_command):
    code, told = sage_command("llm", "operators", "sage_map")
    assert code == 0
    assert "sage_map" in told


def test_options_are_ours_wherever_they_stand(sage_command):
    assert "sagellm, version" in sage_command("llm", "--version")[1]
    code, told = sage_command("llm", "--help")
    assert code == 0
    assert "Usage: sage llm" in told
    assert "simulate" in told
    assert "--allow-module" in sage_command("llm", "validate", "--help")[1]


def test_exit_codes_are_ours(sage_command):
    code, told = sage_command("llm", "valdate")
    assert code == 2
    assert "did you mean 'validate'" in told
    assert sage_command("llm", "validate", "no-such.yaml")[0] == 78


def test_sages_own_commands_are_still_there(sage_command):
    code, told = sage_command("version")
    assert code == 0
    assert told.startswith("SAGE ")
    assert "llm" in sage_command("--help")[1]


WITHOUT = "import sys; sys.modules['sage'] = None\n"


def test_without_isage_the_integration_says_what_to_install():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + "import sageLLM.integrations.sage"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert 'ImportError: sageLLM.integrations.sage needs SAGE: pip install "sagellm[sage]"' in done.stderr


def test_without_isage_everything_else_works():
    code = "from sageLLM.cli.main import cli; import sageLLM.integrations; cli(['operators', 'sage_map'])"
    done = subprocess.run([sys.executable, "-c", WITHOUT + code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_plugin_imports_nothing_that_could_be_missing():
    """SAGE loads it for its own commands too, and would break with it."""
    code = "import sys; had = {*sys.modules}; import sageLLM.cli.sage_plugin; print(*{*sys.modules} - had)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    others = {name for name in done.stdout.split() if name.split(".")[0] not in sys.stdlib_module_names}
    assert others == {"sageLLM", "sageLLM.cli", "sageLLM.cli.sage_plugin"}


def test_importing_it_loads_no_torch():
    code = "import sys, sageLLM.integrations.sage; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
