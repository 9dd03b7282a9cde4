"""The verbs that declare: validate, graph, operators, echo, schema."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

import sageLLM
from sageLLM.cli.main import VERBS, cli
from sageLLM.graph import registry

MODULE = '''\
from sageLLM.runtime.flow.operator import ERROR_PORT, Operator, OperatorConfig, Port, RecordKind, operator


class LinesConfig(OperatorConfig):
    """Where the lines are."""

    path: str


@operator("lines")
class Lines(Operator[LinesConfig]):
    """Reads lines."""

    config_model = LinesConfig
    guarantee = "each line once"
    outputs = (Port("out", frozenset({RecordKind.REQUEST})), ERROR_PORT)
    example = "lines: {path: a.txt}"


@operator("nowhere")
class Nowhere(Operator[OperatorConfig]):
    """Forgets everything."""

    guarantee = "nothing is kept"
    inputs = (Port("in"),)
'''

PIPELINE = """\
vars: {input: a.txt}
operators:
  lines:
    path: ${input}
  nowhere:
edges: [lines -> nowhere, lines.error -> nowhere]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a pipeline and a module of its own operators, which is the current directory."""
    import sageLLM.operators  # noqa: F401

    registry.all_specs()  # registers the built-in operators for good, before the registry is copied
    (tmp_path / "own_operators.py").write_text(MODULE)
    (tmp_path / "p.yaml").write_text(PIPELINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(registry, "_SPECS", dict(registry._SPECS))
    monkeypatch.delitem(sys.modules, "own_operators", raising=False)
    return tmp_path


def call(*args: str) -> Result:
    return CliRunner().invoke(cli, [*args, "--allow-module", "own_operators"])


def test_validate_accepts(folder: Path) -> None:
    result = call("validate", "p.yaml")
    assert (result.exit_code, result.stdout) == (0, "p.yaml: 'p' is valid: 2 operators, 2 edges\n")


def test_validate_reports_every_problem_on_stderr_with_exit_code_78(folder: Path) -> None:
    (folder / "p.yaml").write_text(PIPELINE.replace("path:", "pth:").replace("lines.error", "lines.eror"))
    result = call("validate", "p.yaml")
    assert result.exit_code == 78
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["p.yaml:3:3", "p.yaml:4:5", "p.yaml:6:27"]


def test_the_source_of_the_engine_is_refused_in_a_file(folder: Path) -> None:
    text = "operators:\n  call_source:\n  write: {type: reply_sink}\nedges: [call_source -> write]\n"
    (folder / "p.yaml").write_text(text)
    result = CliRunner().invoke(cli, ["validate", "p.yaml"])
    assert result.exit_code == 78
    source = result.stderr.splitlines()[0]
    assert source.startswith("p.yaml:2:3: 'call_source' is for programs: use SageLLMEngine, or write one of: ")
    assert "jsonl_source" in source and "call_" not in source.partition("write")[2]


def test_without_permission_no_module_is_imported(folder: Path) -> None:
    (folder / "p.yaml").write_text(PIPELINE.replace("  lines:", "  lines:\n    type: own_operators.Lines"))
    result = CliRunner().invoke(cli, ["validate", "p.yaml"])
    assert result.exit_code == 78
    assert "a pipeline cannot import code" in result.stderr
    assert "--allow-module own_operators" in result.stderr
    assert "own_operators" not in sys.modules


@pytest.mark.parametrize(
    ("module", "text", "told"),
    [
        ("not_there", "", "no module 'not_there' in the current directory or installed"),
        ("torn.inner", "", "no module 'torn.inner' in the current directory or installed"),
        ("./torn.py", "", "write the module's name, without .py: torn"),
        ("torn", "\nimport not_there\n", "torn.py:2: ModuleNotFoundError: No module named 'not_there'"),
        ("torn", "x = 1\ndef broken(:\n", "torn.py:2: invalid syntax"),
        ("torn", "def fail():\n    return nowhere\n\nfail()\n", "torn.py:4: NameError: name 'nowhere' is not defined"),
        (
            "torn",
            "from sageLLM.operators import Operator, operator\n\n@operator('tee')\nclass Mine(Operator):\n    pass\n",
            "torn.py:3: operator 'tee' is already registered by sageLLM.operators.tee: choose another name",
        ),
    ],
)
def test_a_module_that_cannot_be_imported(
    folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, text: str, told: str
) -> None:
    monkeypatch.delitem(sys.modules, "torn", raising=False)
    (folder / "torn.py").write_text(text)
    result = CliRunner().invoke(cli, ["validate", "p.yaml", "--allow-module", module])
    assert result.exit_code == 2
    assert result.stderr.endswith(f"\nError: --allow-module {module}: {told}\n")


def test_graph_in_four_formats(folder: Path) -> None:
    assert call("graph", "p.yaml").stdout.startswith("○ lines\n│ request\n│ error\n◆ nowhere")
    assert call("graph", "p.yaml", "--format", "dot").stdout.startswith("digraph")
    assert call("graph", "p.yaml", "--format", "mermaid").stdout.startswith("flowchart")
    assert json.loads(call("graph", "p.yaml", "--format", "json").stdout)["name"] == "p"


def test_echo_resolves(folder: Path) -> None:
    result = call("echo", "p.yaml", "--set", "input=b.txt", "--set", "operators.nowhere.buffer=3")
    values = yaml.safe_load(result.stdout)
    assert values["operators"] == {"lines": {"path": "b.txt"}, "nowhere": {"buffer": 3}}
    assert "vars" not in values
    everything = yaml.safe_load(call("echo", "p.yaml", "--defaults").stdout)
    assert everything["operators"]["lines"]["on_error"] == "route"
    assert everything["engine"]["kv_cache"]["block_size"] == 16


def test_operators_lists_all_types(folder: Path) -> None:
    lines = call("operators").stdout.splitlines()
    assert any(line.split() == ["lines", "Reads", "lines."] for line in lines)
    assert len(lines) == len(registry.all_specs())


def test_operators_describes_one(folder: Path) -> None:
    text = call("operators", "lines").stdout
    assert text.startswith("lines: Reads lines.\n\nGuarantee: each line once\n")
    for line in (
        "  out      request",
        "  error    dead_letter",
        "  path: string (required)",
        "  buffer: integer > 0 (default 1024)",
        '  on_error: route | drop | fail (default "route")',
        "  lines: {path: a.txt}",
    ):
        assert line in text.splitlines()


def test_the_ends_of_the_engine_are_described_but_not_offered(folder: Path) -> None:
    assert "call_" not in call("operators").stdout
    assert "No file may name it." in call("operators", "call_source").stdout
    assert "call_" not in call("schema").stdout


def test_operators_knows_the_nearest_name(folder: Path) -> None:
    result = call("operators", "lins")
    assert result.exit_code == 2
    assert result.stderr.endswith("\nError: no operator type 'lins'; did you mean 'lines'?\n")


@pytest.mark.parametrize("setting", ["input", "=3", "operators..buffer=3"])
def test_a_setting_without_key_or_value_is_a_usage_error(folder: Path, setting: str) -> None:
    result = call("validate", "p.yaml", "--set", setting)
    assert result.exit_code == 2
    assert f"Invalid value for '--set': '{setting}': write key=value, as in --set input=x.jsonl" in result.stderr


def test_schema_knows_the_operators_of_allowed_modules(folder: Path) -> None:
    schema = json.loads(call("schema").stdout)
    assert schema["$defs"]["operator.lines"]["required"] == ["path"]


def test_an_unknown_verb_is_told_the_nearest() -> None:
    result = CliRunner().invoke(cli, ["valdate", "p.yaml"])
    assert result.exit_code == 2
    assert "no such verb 'valdate'; did you mean 'validate'?" in result.stderr


def test_help_lists_every_verb_without_loading_one() -> None:
    code = (
        "import sys\n"
        "from sageLLM.cli.main import cli\n"
        "cli(['--help'], standalone_mode=False)\n"
        "print([m for m in ('pydantic', 'yaml', 'rich', 'torch', 'sageLLM.cli.validate') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(f"  {name} " in done.stdout for name in VERBS)


@pytest.mark.parametrize("verb", ["validate", "graph", "echo", "operators", "schema"])
def test_verbs_that_declare_load_nothing_heavy(verb: str, folder: Path) -> None:
    arguments = [
        verb,
        "--allow-module",
        "own_operators",
        *(["p.yaml"] if verb in ("validate", "graph", "echo") else []),
    ]
    code = (
        "import sys\n"
        "from sageLLM.cli.main import cli\n"
        f"cli({arguments!r}, standalone_mode=False)\n"
        "heavy = ('torch', 'networkx', 'numpy', 'transformers', 'tokenizers', 'rich', 'jinja2', 'huggingface_hub')\n"
        "print([m for m in heavy if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_only_the_operators_of_a_pipeline_are_loaded() -> None:
    file = Path(sageLLM.__file__).parent / "pipelines/quickstart.yaml"
    code = (
        "import sys\n"
        "from sageLLM.cli.main import cli\n"
        f"cli(['validate', {str(file)!r}], standalone_mode=False)\n"
        "print(*(m for m in sys.modules if 'operators.' in m or m in ('ssl', 'asyncio', 'numpy')), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {module.rpartition(".")[2] for module in done.stderr.split()}
    assert {"decode", "jsonl_source", "jsonl_sink"} <= loaded
    unused = {"http_source", "tcp_source", "tcp_sink", "sage_map", "request_format", "ssl", "asyncio", "numpy"}
    assert not loaded & unused


def test_every_shipped_pipeline_is_valid() -> None:
    files = sorted((Path(sageLLM.__file__).parent / "pipelines").glob("*.yaml"))
    assert files
    for file in files:
        result = CliRunner().invoke(cli, ["validate", str(file)])
        assert result.exit_code == 0, result.stderr


def test_every_operator_shows_its_guarantee_and_an_example_that_is_yaml() -> None:
    import sageLLM.operators  # noqa: F401

    for name, spec in registry.all_specs().items():
        result = CliRunner().invoke(cli, ["operators", name])
        assert result.exit_code == 0
        assert spec.guarantee and spec.summary, name
        assert isinstance(yaml.safe_load(spec.example), dict), name
