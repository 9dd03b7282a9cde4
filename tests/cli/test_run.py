"""`sagellm run`: exit codes, what is shown and where, pipes, and signals."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from sageLLM.cli.main import cli

FILES = """\
name: answers
vars: {input: in.jsonl}
engine:
  model: {model_id: builtin:null}
  kv_cache: {max_tokens: 1048576}
operators:
  read: {type: jsonl_source, path: "${input}"}
  tokenize: {}
  kv_lookup: {}
  schedule: {}
  prefill: {}
  kv_commit: {}
  decode: {}
  detokenize: {}
  metrics: {}
  write: {type: jsonl_sink, path: out.jsonl}
  dead: {type: jsonl_sink, path: dead.jsonl}
edges:
  - read -> tokenize -> kv_lookup -> schedule -> prefill -> kv_commit -> decode -> detokenize -> metrics -> write
  - "*.error -> dead"
"""
PIPE = (
    FILES.replace("{type: jsonl_source, path: \"${input}\"}", "{type: stdin_source}")
    .replace("{type: jsonl_sink, path: out.jsonl}", "{type: stdout_sink, format: text}")
    .replace("vars: {input: in.jsonl}\n", "")
)  # fmt: skip


class Shell:
    """A folder with answers.yaml (files) and pipe.yaml (stdin to stdout)."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "answers.yaml").write_text(FILES)
        (folder / "pipe.yaml").write_text(PIPE)

    def write(self, count, tokens=4):
        line = json.dumps({"prompt": "hi", "max_new_tokens": tokens, "ignore_eos": True})
        (self.folder / "in.jsonl").write_text(f"{line}\n" * count)

    def start(self, *arguments, **streams):
        command = [sys.executable, "-c", "from sageLLM.cli.main import main; main()", "run", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
        return subprocess.Popen(command, cwd=self.folder, text=True, **pipes)

    def run(self, *arguments, given=None):
        """(exit code, stdout, stderr)"""
        with self.start(*arguments, stdin=subprocess.PIPE if given is not None else None) as process:
            stdout, stderr = process.communicate(given)
        return process.returncode, stdout, stderr

    def results(self):
        return [json.loads(line) for line in (self.folder / "out.jsonl").read_text().splitlines()]

    def start_and_wait_for_results(self, *arguments):
        process = self.start(*arguments)
        output = self.folder / "out.jsonl"
        while process.poll() is None and not (output.exists() and output.stat().st_size):
            time.sleep(0.005)
        return process


@pytest.fixture
def shell(tmp_path):
    return Shell(tmp_path)


def test_done_is_0_and_the_summary_goes_to_stderr_without_a_terminal_in_plain_lines(shell):
    shell.write(30)
    code, stdout, stderr = shell.run("answers.yaml")
    assert (code, stdout) == (0, "")
    lines = stderr.splitlines()
    assert lines[0] == "answers: loading builtin:null"
    assert lines[1].startswith("answers: ready after ")
    assert lines[2].startswith("30 requests in ")
    for name in ("queue ms", "TTFT ms", "TPOT ms", "E2E ms", "p50", "p99", "120 output tokens", "tok/s", "prefix hits"):
        assert name in stderr
    assert lines[-1] == "done 30"
    assert "\x1b" not in stderr, "colours and cursor movements are for terminals"
    assert len(shell.results()) == 30


def test_quiet_says_nothing(shell):
    shell.write(3)
    assert shell.run("answers.yaml", "--quiet") == (0, "", "")
    assert len(shell.results()) == 3


def test_on_a_terminal_progress_moves(shell, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")  # on a dumb terminal nothing moves
    monkeypatch.delenv("CI", raising=False)
    shell.write(200, tokens=200)
    ours, theirs = pty.openpty()
    with shell.start("answers.yaml", stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                chunk = os.read(ours, 1 << 16)
            except OSError:  # how Linux says that nobody writes to a terminal any more
                break
            shown += chunk
    os.close(ours)
    assert process.returncode == 0
    for text in (b"in flight", b"tok/s", b"TTFT p50", b"prefix hits", b"\x1b[", b"done 200"):
        assert text in shown


def test_set_changes_vars_and_keys(shell):
    shell.write(3, tokens=50)
    os.rename(shell.folder / "in.jsonl", shell.folder / "mine.jsonl")
    keys = ("--set", "input=mine.jsonl", "--set", "engine.model.max_seq_len=12")
    assert shell.run("answers.yaml", "-q", *keys)[0] == 0
    assert [result["usage"]["total_tokens"] for result in shell.results()] == [12] * 3
    assert shell.results()[0]["src"]["file"] == "mine.jsonl"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing.yaml"], "nothing.yaml:1:1: cannot be read: No such file or directory"),
        (["answers.yaml", "--set", "operators.decode.bufer=3"], "did you mean 'buffer'?"),
        (["answers.yaml", "--set", "inputs=x"], "did you mean 'input'?"),
        (["answers.yaml", "--set", "engine.model.quantization=int4"], "not available yet"),
        (["answers.yaml", "--set", "input=absent.jsonl"], "absent.jsonl"),
    ],
)
def test_a_wrong_pipeline_is_78(shell, monkeypatch, arguments, said):
    shell.write(1)
    monkeypatch.chdir(shell.folder)
    result = CliRunner().invoke(cli, ["run", *arguments])
    assert (result.exit_code, result.stdout) == (78, "")
    assert said in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["operators.tokenize.on_error=fail", "engine.model.max_seq_len=2"], "(on_error: fail)"),
        (["engine.benchmark={enable_gates: true, min_throughput_tps: 1e12}"], "is below 1e+12"),
        (["engine.model.model_id=builtin:nothing"], "builtin:nothing"),
    ],
)
def test_a_run_that_failed_is_1(shell, settings, said):
    shell.write(2)
    code, _, stderr = shell.run("answers.yaml", *(f"--set={setting}" for setting in settings))
    assert code == 1
    assert said in stderr
    assert "Traceback" not in stderr


def test_two_runs_cannot_write_the_same_file(shell):
    shell.write(3000, tokens=1000)
    with shell.start_and_wait_for_results("answers.yaml", "-q") as first:
        code, _, stderr = shell.run("answers.yaml", "-q")
        first.kill()
    assert code == 1
    assert "out.jsonl" in stderr


def test_from_a_pipe_to_a_pipe(shell):
    code, stdout, stderr = shell.run("pipe.yaml", "-q", given='{"prompt": "hi", "max_new_tokens": 5}\nnonsense\n')
    assert (code, stdout, stderr) == (0, "cdefg\n", "")
    assert json.loads((shell.folder / "dead.jsonl").read_text())["raw"] == "nonsense"


def test_answers_come_while_the_pipe_is_still_open(shell):
    with shell.start("pipe.yaml", "-q", stdin=subprocess.PIPE) as process:
        for letters in ("cde", "def", "efg"):
            question = "h" * (ord(letters[0]) - 97)
            process.stdin.write(json.dumps({"prompt": question, "max_new_tokens": 3}) + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == f"{letters}\n"
        process.stdin.close()
        assert process.wait() == 0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_finishes_what_is_in_flight_and_the_next_run_goes_on(shell, name):
    shell.write(1200, tokens=300)
    few = [f"--set=operators.{stage}.buffer=32" for stage in ("tokenize", "kv_lookup", "schedule")]
    with shell.start_and_wait_for_results("answers.yaml", *few) as process:
        process.send_signal(getattr(signal, name))
        _, stderr = process.communicate()
    assert process.returncode == 0
    first = shell.results()
    assert 0 < len(first) < 1200, "the signal came too late"
    assert {len(result["output_tokens"]) for result in first} == {300}, "none was cut off"
    assert f"done {len(first)}" in stderr
    assert name in stderr
    code, _, stderr = shell.run("answers.yaml")
    assert code == 0
    assert f"done {1200 - len(first)}" in stderr
    assert sorted(result["src"]["line"] for result in shell.results()) == list(range(1, 1201))


def test_a_signal_lets_lines_go_that_have_not_had_their_turn(shell):
    """They were read far ahead of a slow model; the next run computes them."""
    shell.write(200, tokens=300)
    with shell.start_and_wait_for_results("answers.yaml", "--set=engine.scheduler.max_batch_size=2") as process:
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate()
    assert process.returncode == 0
    done = len(shell.results())
    assert done < 100
    assert "cancelled" in stderr
    assert "stopped early: SIGTERM" in stderr
    assert shell.run("answers.yaml")[0] == 0
    assert sorted(result["src"]["line"] for result in shell.results()) == list(range(1, 201))
    assert {result["finish_reason"] for result in shell.results()} == {"length"}
    assert not (shell.folder / "dead.jsonl").read_text()


def test_lines_that_are_let_go_reach_no_other_output_either(shell):
    shell.write(200, tokens=300)
    shown = FILES.replace("write: {type: jsonl_sink, path: out.jsonl}", "write: {type: stdout_sink}")
    (shell.folder / "answers.yaml").write_text(shown)
    with shell.start("answers.yaml", "--set=engine.scheduler.max_batch_size=2") as process:
        first = process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate()
    results = [json.loads(line) for line in (first + rest).splitlines()]
    assert process.returncode == 0
    assert len(results) < 150
    assert {result["finish_reason"] for result in results} == {"length"}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_while_the_model_loads_ends_the_run_at_once(shell, name):
    shell.write(3)
    config = shell.folder / "model" / "config.json"
    config.parent.mkdir()
    os.mkfifo(config)  # loading waits for somebody to write it
    with shell.start("answers.yaml", f"--set=engine.model.model_id={config.parent}") as process:
        while process.poll() is None:
            try:
                writer = os.open(config, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:  # nobody reads it yet
                time.sleep(0.005)
                continue
            break
        process.send_signal(getattr(signal, name))
        try:
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
            os.close(writer)
    assert process.returncode == 0
    assert stderr.splitlines() == [f"answers: loading {config.parent}", f"stopped early: {name}"]
    assert not (shell.folder / "out.jsonl").exists()


def test_a_second_signal_stops_at_once_and_nothing_is_lost(shell):
    shell.write(200, tokens=4)
    long = json.dumps({"prompt": "hi", "max_new_tokens": 32000, "ignore_eos": True}) + "\n"
    with (shell.folder / "in.jsonl").open("a") as file:
        file.write(long * 400)  # minutes of work
    with shell.start_and_wait_for_results("answers.yaml") as process:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
    assert process.returncode == 1
    assert "aborted: second signal" in stderr
    assert "Traceback" not in stderr
    assert 0 < len(shell.results()) < 600


BROKEN = """\
from sageLLM.operators import Operator, OperatorConfig, Port, RecordKind, operator

@operator("broken")
class Broken(Operator[OperatorConfig]):
    inputs = (Port("in", frozenset({RecordKind.DELTA, RecordKind.COMPLETION})),)
    outputs = (Port("out", same_as="in"),)

    async def process(self, records, out):
        raise ValueError("boom")
"""


def test_records_that_are_lost_for_want_of_an_error_port_fail_the_run(shell):
    shell.write(5)
    (shell.folder / "broken.py").write_text(BROKEN)
    pipeline = FILES.replace("  metrics: {}", "  broken: {}\n  metrics: {}")
    pipeline = pipeline.replace("-> metrics", "-> broken -> metrics")
    (shell.folder / "answers.yaml").write_text(pipeline)
    code, _, stderr = shell.run("answers.yaml", "--allow-module=broken")
    assert code == 1
    assert "error 5" in stderr
    assert "records are lost, since the operators that rejected them have no error port: 'broken' 5" in stderr


def test_an_output_that_takes_nothing_fails_the_run(shell):
    with open("/dev/full", "w") as full:
        process = shell.start("pipe.yaml", "-q", stdin=subprocess.PIPE, stdout=full)
        _, stderr = process.communicate('{"prompt": "hi", "max_new_tokens": 2}\n')
    assert process.returncode == 1
    assert "records are lost" in stderr
    assert "No space left on device" in stderr
