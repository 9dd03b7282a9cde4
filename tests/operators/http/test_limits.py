"""http_source under load, at its beginning and its end: who is refused, with which status, and who gets answers."""

from __future__ import annotations

import json
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path

import anyio
import pytest

from sageLLM.errors import ConfigError
from sageLLM.graph import load_pipeline
from sageLLM.runtime.assembly import assemble
from sageLLM.runtime.services import EngineServices

from .conftest import SERVE

PROMPT = {"prompt": "hello", "max_tokens": 3}
ENDLESS = {"prompt": "hello", "max_tokens": 30000, "ignore_eos": True}


def lines_of(response):
    return [line for line in response.read().decode().split("\n") if line]


class Streaming:
    """A stream that has begun: its connection, and the response to read from."""

    def __init__(self, server, **body):
        self.connection = HTTPConnection("127.0.0.1", server.port, timeout=20)
        body = json.dumps({**ENDLESS, **body, "stream": True})
        self.connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        self.response = self.connection.getresponse()
        assert self.response.status == 200

    def __enter__(self):
        return self.response

    def __exit__(self, *_):
        self.response.close()
        self.connection.close()


def test_too_many_are_told_how_many_wait_and_when_to_come_again(serve):
    with serve("operators.source.max_in_flight=2") as server, Streaming(server), Streaming(server):
        status, headers, body = server.exchange("POST", "/v1/completions", PROMPT)
        assert (status, body["error"]["type"]) == (429, "rate_limit_error")
        assert 1 <= int(headers["retry-after"]) <= 60
        assert int(headers["x-queue-depth"]) >= 0
        assert server.exchange("GET", "/health")[0] == 200
        streamed = server.exchange("POST", "/v1/completions", {**PROMPT, "stream": True})
        assert streamed[0] == 429
        counters = server.flow.ledger.counters()
        assert (counters["shed"], counters["in_flight"]) == (2, 2)


def test_of_several_prompts_all_are_taken_or_none(serve):
    with serve("operators.source.max_in_flight=2") as server:
        assert server.post("/v1/completions", prompt=["a", "b", "c"], max_tokens=3)[0] == 429
        assert server.post("/v1/completions", prompt=["a", "b"], max_tokens=3)[0] == 200


def test_a_slot_that_does_not_come_is_a_timeout(serve):
    settings = ["engine.scheduler.max_batch_size=1", "engine.scheduler.queue_timeout_s=0.1"]
    with serve(*settings) as server, Streaming(server):
        status, _, body = server.exchange("POST", "/v1/completions", PROMPT)
        assert (status, body["error"]["code"], body["error"]["type"]) == (504, "queue_timeout", "timeout_error")


def test_a_stream_that_fails_on_its_way_says_so(serve):
    with serve("engine.scheduler.request_timeout_s=0.3") as server, Streaming(server) as response:
        *_, failure, done = lines_of(response)
        assert '"code":"timeout"' in failure
        assert done == "data: [DONE]"


def test_while_the_model_loads_there_is_health_but_nothing_else(serve):
    with serve(loading=True) as server:
        assert server.exchange("GET", "/health")[0] == 200
        for method, path, body in (("GET", "/ready", None), ("POST", "/v1/completions", PROMPT)):
            status, headers, answer = server.exchange(method, path, body)
            assert (status, answer["error"]["code"]) == (503, "loading")
            assert headers["retry-after"]
        server.loaded.set()
        server.until(lambda: server.source.intake is not None)
        assert server.exchange("GET", "/ready")[0] == 200
        assert server.post("/v1/completions", **PROMPT)[0] == 200


def test_draining_finishes_what_is_in_flight_and_refuses_the_rest(serve):
    with serve() as server:
        with Streaming(server, max_tokens=4000) as response:
            server.drain()
            assert server.exchange("GET", "/ready")[0] == 503
            status, headers, body = server.exchange("POST", "/v1/completions", PROMPT)
            assert (status, body["error"]["code"]) == (503, "closing")
            assert headers["retry-after"]
            assert server.exchange("GET", "/health")[0] == 200
            lines = lines_of(response)
        assert '"finish_reason":"length"' in lines[-2]
        server.ended.result(20)
        with pytest.raises(ConnectionRefusedError):
            server.connect()


def test_what_does_not_end_in_time_is_cancelled(serve):
    with serve("operators.source.drain_timeout_s=0.2") as server:
        with Streaming(server) as response:
            server.drain()
            *_, failure, done = lines_of(response)
        assert '"code":"cancelled"' in failure
        assert done == "data: [DONE]"
        server.ended.result(20)
        assert server.flow.ledger.counters()["cancelled"] == 1


def test_when_the_flow_fails_everybody_is_told(serve):
    with serve() as server, ThreadPoolExecutor(1) as threads, Streaming(server) as response:
        whole = threads.submit(server.post, "/v1/completions", **ENDLESS)
        server.until(lambda: server.services.worker.num_running == 2)
        server.is_to_fail = True
        server.call(server.flow.abort, "the test says so")
        lines = lines_of(response)
        assert any('"error"' in line for line in lines)
        status, body = whole.result(20)
        assert status in (500, 503)
        assert body["error"]["type"] == "server_error"


def test_a_second_server_on_the_port_is_one_clear_error(serve, null_server):
    with pytest.raises(ConfigError, match="http://127.0.0.1:.* is in use"), serve(f"port={null_server.port}"):
        pass


def test_keys_are_asked_for_where_there_are_any(serve, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = "- {name: alice, key: s3cret}\n- {name: bob, key: other, requests_per_minute: 1}"
    (tmp_path / "keys.yaml").write_text(keys)
    with serve("operators.source.keys=keys.yaml") as server:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic s3cret"}):
            status, answered, body = server.exchange("POST", "/v1/completions", PROMPT, **headers)
            assert (status, body["error"]["code"]) == (401, "invalid_api_key")
            assert answered["www-authenticate"] == "Bearer"
            assert "s3cret" not in str(body)
        assert server.exchange("GET", "/v1/models")[0] == 401
        assert server.exchange("GET", "/ready")[0] == 200
        assert server.exchange("POST", "/v1/completions", PROMPT, authorization="Bearer s3cret")[0] == 200
        told = [server.exchange("POST", "/v1/completions", PROMPT, authorization="Bearer other") for _ in range(2)]
        assert [status for status, _, _ in told] == [200, 429]
        assert told[1][2]["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(told[1][1]["retry-after"]) <= 60


def test_who_waits_for_a_slot_sees_signs_of_life(serve, monkeypatch):
    from sageLLM.operators.sources import http_source

    monkeypatch.setattr(http_source, "_KEEP_ALIVE_S", 0.05)
    with serve("engine.scheduler.max_batch_size=1") as server:
        gate = threading.Event()
        with ThreadPoolExecutor(1) as threads, Streaming(server):

            def wait_in_line():
                with Streaming(server, max_tokens=2) as response:
                    gate.set()
                    return lines_of(response)

            waiting = threads.submit(wait_in_line)
            gate.wait()  # the status and a sign of life are there, though nothing is computed
            server.until(lambda: server.services.num_waiting == 1)
        lines = waiting.result(20)
    assert lines[0] == ": keep-alive"
    assert lines[-1] == "data: [DONE]"


CERTIFICATES = Path(__file__).parents[1] / "net" / "certificates"
TLS = f"operators.source.tls={{cert: {CERTIFICATES}/server.pem, key: {CERTIFICATES}/server.key}}"


def test_a_handshake_has_as_long_as_a_head(serve):
    with serve(TLS, "operators.source.read_timeout_s=0.1") as server, server.connect() as connection:
        assert connection.recv(1) == b""


def test_over_tls(serve):
    with serve(TLS) as server:
        assert server.source.address.startswith("https://")
        context = ssl.create_default_context(cafile=CERTIFICATES / "ca.pem")
        connection = HTTPSConnection("localhost", server.port, timeout=20, context=context)
        connection.request("POST", "/v1/completions", json.dumps(PROMPT), {"content-type": "application/json"})
        assert connection.getresponse().status == 200
        connection.close()


def test_another_event_loop_is_refused_in_words():
    pipeline = load_pipeline(SERVE, ["model=builtin:null", "port=0"])
    flow = assemble(pipeline, EngineServices(pipeline.engine))

    async def main():
        async with flow.claimed():
            pass

    with pytest.raises(ConfigError, match="needs asyncio's event loop"):
        anyio.run(main, backend="trio")
