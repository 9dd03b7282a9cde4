"""`sagellm serve`: flags, what it says and where, a port that is taken, signals."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

NULL = ("--model", "builtin:null")


@pytest.fixture
def start(tmp_path):
    """`start("--port", "0")`: the process of a verb, `serve` unless told otherwise."""
    running = []

    def run(*arguments, verb="serve"):
        command = [sys.executable, "-c", "from sageLLM.cli.main import main; main()", verb, *arguments]
        environment = {**os.environ, "SERVE_KEY": "s3cret"}
        process = subprocess.Popen(
            command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )
        running.append(process)
        return process

    yield run
    for process in running:
        process.kill()
        process.communicate()


def address_of(process):
    """Where it says, on stderr, that it is ready."""
    for line in process.stderr:
        if found := re.fullmatch(r"source is ready on (http://\S+)\n", line):
            return found[1]
    raise AssertionError("it ended before it was ready")


def ask(address, key=None):
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    body = json.dumps({"prompt": "hi", "max_tokens": 2}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{address}/v1/completions", body, headers)) as response:
        return json.load(response)


def test_it_says_where_it_is_ready_and_ends_with_the_signal(start):
    process = start(*NULL, "--port", "0")
    address = address_of(process)
    assert address.startswith("http://127.0.0.1:")
    assert ask(address)["model"] == "builtin:null"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 0
    assert "done 1" in said
    assert "Traceback" not in said


def test_run_serves_the_same_pipeline(start):
    from sageLLM.cli.serve import DEFAULT_PIPELINE

    process = start(str(DEFAULT_PIPELINE), "--set", "model=builtin:null", "--set", "port=0", verb="run")
    assert ask(address_of(process))["model"] == "builtin:null"


def test_a_port_that_is_taken_is_one_clear_error(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start("--port", str(taken.getsockname()[1]))
        _, said = process.communicate()
    assert process.returncode == 78
    assert "is in use" in said
    assert "loading" not in said  # nothing was loaded for it
    assert "Traceback" not in said


def test_keys_are_never_shown(start, tmp_path):
    (tmp_path / "keys.yaml").write_text("- {name: alice, key_env: SERVE_KEY}\n")
    process = start(*NULL, "--port", "0", "--keys", "keys.yaml")
    address = address_of(process)
    assert ask(address, key="s3cret")["usage"]["completion_tokens"] == 2
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(address, key="wr0ng")
    assert caught.value.code == 401
    caught.value.close()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert "s3cret" not in said
    assert "wr0ng" not in said


def test_a_pipeline_without_http_is_for_run(start):
    from sageLLM.cli.serve import DEFAULT_PIPELINE

    process = start(str(DEFAULT_PIPELINE.with_name("quickstart.yaml")))
    _, said = process.communicate()
    assert process.returncode == 78
    assert "serve needs one http_source, found none: use `sagellm run`" in said
    assert "Traceback" not in said
