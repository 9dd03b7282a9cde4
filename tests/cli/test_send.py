"""`sagellm send`: a file's requests over every way in, with all of their answers or a clear failure."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from sageLLM.cli.main import cli

SAGELLM = (sys.executable, "-c", "from sageLLM.cli.main import main; main()")
CERTIFICATES = Path(__file__).parents[1] / "operators/net/certificates"
YAML = """\
engine:
  model: {model_id: builtin:null}
operators:
  tcp: {type: tcp_source, port: 0}
  packed:
    {type: tcp_source, port: 0, framing: msgpack, keys: keys.yaml, tls: {cert: CERT/server.pem, key: CERT/server.key}}
  small: {type: tcp_source, port: 0, max_in_flight: 1}
  local: {type: unix_source, path: s.sock}
  web: {type: websocket_source, port: 0, keys: keys.yaml}
  tokenize: {}
  schedule: {}
  prefill: {}
  decode: {}
  detokenize: {}
  reply: {type: reply_sink}
edges:
  - tcp -> tokenize
  - packed -> tokenize
  - small -> tokenize
  - local -> tokenize
  - web -> tokenize
  - tokenize -> schedule -> prefill -> decode -> detokenize -> reply
  - "*.error -> reply"
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A pipeline that listens in every way, in a process of its own: the addresses by operator."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "listen.yaml").write_text(YAML.replace("CERT", str(CERTIFICATES)))
    (folder / "keys.yaml").write_text("- {key: sesame, name: alice}")
    process = subprocess.Popen([*SAGELLM, "run", "listen.yaml"], cwd=folder, stderr=subprocess.PIPE, text=True)
    addresses = {}
    while len(addresses) < 5:
        line = process.stderr.readline()
        assert line, "the server has ended"
        if found := re.match(r"(\w+) is ready on (\S+)", line):
            addresses[found[1]] = found[2]
    rest = threading.Thread(target=process.stderr.read)
    rest.start()
    yield addresses
    process.terminate()
    assert process.wait() == 0
    rest.join()
    process.stderr.close()


@pytest.fixture
def send(tmp_path, monkeypatch):
    """`send(address, lines, *options)` -> (exit code, what was printed as results, stderr)."""
    monkeypatch.setenv("ALICE_KEY", "sesame")

    def run(address, lines, *options):
        (tmp_path / "in.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
        result = CliRunner().invoke(cli, ["send", str(tmp_path / "in.jsonl"), "--to", address, *options])
        return result.exit_code, [json.loads(line) for line in result.stdout.splitlines()], result.stderr

    return run


QUESTIONS = [json.dumps({"prompt": "x" * (n + 1), "max_new_tokens": 3}).encode() for n in range(30)]


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("tcp", []),
        ("packed", ["--framing", "msgpack", "--key-env", "ALICE_KEY", "--ca", str(CERTIFICATES / "ca.pem")]),
        ("local", ["--max-in-flight", "3"]),
        ("web", ["--key-env", "ALICE_KEY"]),
    ],
)
def test_every_request_gets_its_answer(server, send, way, options):
    code, results, told = send(server[way], [*QUESTIONS, b"", b'{"prompt": "x", "id": "mine"}'], *options)
    assert code == 0, told
    assert {result["event"] for result in results} == {"done"}
    lengths = {result["request_id"]: result["usage"]["prompt_tokens"] for result in results}
    assert lengths == {**{f"line-{n + 1}": n + 1 for n in range(30)}, "mine": 1}
    assert told.splitlines()[-1] == "done 31"


def test_without_a_terminal_progress_is_a_line_from_time_to_time(server, send, monkeypatch):
    monkeypatch.setattr("sageLLM.cli.send.PLAIN_INTERVAL_S", 0)
    *progress, last = send(server["tcp"], QUESTIONS, "--max-in-flight", "2")[2].splitlines()
    assert last == "done 30"
    assert all(re.fullmatch(r"[0-2] in flight  (no requests|done \d+)", line) for line in progress)
    assert len(progress) >= 15


def test_results_go_to_a_file(server, send, tmp_path):
    code, printed, _ = send(server["tcp"], QUESTIONS, "-o", str(tmp_path / "out.jsonl"), "-q")
    assert (code, printed) == (0, [])
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 30


def test_what_is_shed_is_sent_again(server, send):
    long = [json.dumps({"prompt": "x", "max_new_tokens": 2000, "ignore_eos": True}).encode() for _ in range(2)]
    code, results, told = send(server["small"], long, "--max-in-flight", "2")
    assert (code, len(results)) == (0, 2)
    assert re.fullmatch(r"done 2  sent again [1-9]\d*", told.splitlines()[-1])


def test_bad_lines_are_errors_and_the_rest_is_done(server, send):
    lines = [b"nonsense", b"[1]", b'{"prompt": 5}', b'{"prompt": "x"}', b'{"cancel": "x", "id": "c"}']
    code, results, _ = send(server["tcp"], lines)
    assert code == 1
    events = {result["request_id"]: result["event"] for result in results}
    assert events == {"line-1": "error", "line-2": "error", "line-3": "error", "line-4": "done", "c": "error"}


@pytest.mark.parametrize("way", ["packed", "web"])
def test_a_wrong_key_is_one_clear_error(server, send, monkeypatch, way):
    monkeypatch.setenv("ALICE_KEY", "wrong-one")
    options = ["--framing", "msgpack", "--ca", str(CERTIFICATES / "ca.pem")] if way == "packed" else []
    code, _, told = send(server[way], QUESTIONS, "--key-env", "ALICE_KEY", *options)
    assert code == 1
    assert "key" in told
    assert "wrong-one" not in told


@pytest.mark.parametrize(
    ("address", "options", "told"),
    [
        ("localhost:7000", [], "is no address: write tcp://host:port"),
        ("http://localhost:7000", [], "is no address"),
        ("tcp://localhost", [], "lacks a port"),
        ("tcp://localhost:nine", [], "is no address"),
        ("ws://localhost:1?key=sesame", [], "a key is given by --key-env"),
        ("ws://localhost:1", ["--framing", "msgpack"], "--framing is for tcp and unix"),
        ("tcp://localhost:1", ["--ca", __file__], "--ca is for tcps:// and wss://"),
        ("tcp://localhost:1", ["--key-env", "NOT_THERE"], "the environment has no NOT_THERE"),
    ],
)
def test_a_wrong_command_line_is_said_before_anything_is_sent(send, address, options, told):
    code, _, said = send(address, QUESTIONS, *options)
    assert (code, told in said) == (78, True), said


def test_nobody_there(send, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    code, _, told = send(f"tcp://127.0.0.1:{port}", QUESTIONS)
    assert code == 1
    assert told.startswith(f"no connection to tcp://127.0.0.1:{port}")
    assert send(f"unix://{tmp_path}/none.sock", QUESTIONS)[0] == 1


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"", "the connection ended with 30 requests in flight and 0 ended\n"),
        (b"HTTP/1.1 400\r\n", "does not speak this protocol"),
        (b"[]\n", "does not speak this protocol"),
        (b'{"event": "error", "request_id": null, "error": "go away"}\n', "go away"),
    ],
)
def test_a_server_that_is_none_of_ours_is_a_clear_failure(send, answer, told):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            stream, _ = listening.accept()
            with stream:
                read = b""
                while read.count(b"\n") < 30:
                    read += stream.recv(65536)
                stream.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        code, _, said = send(f"tcp://127.0.0.1:{listening.getsockname()[1]}", QUESTIONS)
        thread.join()
    assert (code, told in said) == (1, True), said
