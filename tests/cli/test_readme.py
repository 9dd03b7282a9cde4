"""What the README and docs/pipelines.md show is what the command line takes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from sageLLM.cli.main import cli
from sageLLM.graph import registry

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = (ROOT / "docs/pipelines.md").read_text(encoding="utf-8")
SOCKETS = (ROOT / "docs/sockets.md").read_text(encoding="utf-8")


def block(text: str, language: str, beginning: str) -> str:
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return next(each for each in blocks if each.startswith(beginning))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import sageLLM.operators  # noqa: F401

    registry.all_specs()  # registers the built-in operators for good, before the registry is copied
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(registry, "_SPECS", dict(registry._SPECS))
    return tmp_path


def validate(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["validate", *args])
    return result.exit_code, result.output


def test_the_pipeline_of_the_readme_is_valid(folder: Path) -> None:
    (folder / "answers.yaml").write_text(block(README, "yaml", "name: answers"))
    assert validate("answers.yaml") == (0, "answers.yaml: 'answers' is valid: 11 operators, 15 edges\n")


def test_the_readmes_broken_pipeline_gives_the_message_shown(folder: Path) -> None:
    (folder / "answers.yaml").write_text(block(README, "yaml", "name: answers"))
    shown = README[README.index("$ sed ") :].splitlines()
    subprocess.run(shown[0].removeprefix("$ ").partition(";")[0], shell=True, check=True)
    assert validate("broken.yaml") == (78, f"{shown[1]}\n")


def test_the_operator_of_the_readme_fits_where_it_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "shout", raising=False)
    (folder / "shout.py").write_text(block(README, "python", "# shout.py"))
    written = block(README, "yaml", "name: answers").replace("detokenize -> metrics", "detokenize -> shout -> metrics")
    (folder / "p.yaml").write_text(written.replace("  metrics: {}", "  shout: {}\n  metrics: {}"))
    assert validate("p.yaml", "--allow-module", "shout")[0] == 0


def test_the_sources_promise_what_the_delivery_table_says(folder: Path) -> None:
    rows = dict(re.findall(r"^\| `(\w+_source)` \| (.*) \|$", REFERENCE.replace("`kill -9`", "kill -9"), re.MULTILINE))
    jsonl, other = rows["jsonl_source"].split(" | ")
    expected = f"{jsonl.replace('once,', 'once with jsonl_sink,')}; with any other sink {other}"
    assert registry.all_specs()["jsonl_source"].guarantee == expected
    assert registry.all_specs()["stdin_source"].guarantee == rows["stdin_source"].split(" | ")[0]


def test_the_stdin_pipeline_of_the_reference_is_valid(folder: Path) -> None:
    (folder / "ask.yaml").write_text(block(REFERENCE, "yaml", "# ask.yaml"))
    assert validate("ask.yaml")[0] == 0


def test_the_pipeline_that_listens_is_valid(folder: Path) -> None:
    (folder / "listen.yaml").write_text(block(SOCKETS, "yaml", "# listen.yaml"))
    assert validate("listen.yaml")[0] == 0


def test_the_keys_of_the_docs_are_keys(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sageLLM.operators.sources.net.keys import KeyRing, KeysConfig

    (folder / "keys.yaml").write_text(block(SOCKETS, "yaml", "# keys.yaml"))
    monkeypatch.setenv("ALICE_KEY", "sesame")
    ring = KeyRing.load(KeysConfig(keys="keys.yaml"), folder, lambda: 0.0)
    alice, bob = ring.authenticate("sesame"), ring.authenticate("secret")
    assert alice is not None and bob is not None
    assert (alice.tenant, bob.tenant) == ("alice", "research")


def test_the_function_of_the_reference_fits_where_it_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "my_functions", raising=False)
    (folder / "my_functions.py").write_text(block(REFERENCE, "python", "# my_functions.py"))
    written = block(README, "yaml", "name: answers").replace("read -> tokenize", "read -> polite -> tokenize")
    operator = "  polite: {type: map, function: be_polite}\n  tokenize: {}"
    (folder / "p.yaml").write_text(written.replace("  tokenize: {}", operator))
    assert validate("p.yaml", "--allow-module", "my_functions")[0] == 0
