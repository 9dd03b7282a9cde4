"""http_source and clients that are rude: over raw sockets. Each ends, none is noticed by anybody else."""

from __future__ import annotations

import json
import re
import socket
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

BODY = json.dumps({"prompt": "hello", "max_tokens": 3}).encode()
ENDLESS = json.dumps({"prompt": "hello", "max_tokens": 30000, "ignore_eos": True, "stream": True}).encode()


def head(path=b"/v1/completions", length=None, *more: bytes, method=b"POST"):
    lines = [b"%b %b HTTP/1.1" % (method, path), b"host: x", b"content-type: application/json", *more]
    if length is not None:
        lines.append(b"content-length: %d" % length)
    return b"\r\n".join(lines) + b"\r\n\r\n"


GOOD = head(length=len(BODY)) + BODY
HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


def read_all(connection) -> bytes:
    """Until the server closes."""
    parts = []
    while True:
        try:
            part = connection.recv(65536)
        except ConnectionResetError:
            break
        if not part:
            break
        parts.append(part)
    return b"".join(parts)


def read_until(connection, end: bytes) -> bytes:
    data = b""
    while end not in data:
        part = connection.recv(65536)
        assert part, f"closed after {data!r}"
        data += part
    return data


def send(server, data: bytes) -> bytes:
    """What comes back, until the server closes."""
    with server.connect() as connection:
        connection.sendall(data)
        return read_all(connection)


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1.1 (\d{3}) ", answer)]


def test_a_stream_to_http_1_0_has_no_chunks_and_ends_with_its_connection(tiny_server):
    """As nginx asks, by default."""
    body = json.dumps({"prompt": "Return the", "max_tokens": 6, "temperature": 0, "stream": True}).encode()
    asked = head(b"/v1/completions", len(body), b"x-request-id: a", b"connection: close") + body
    streams = []
    for version in (b"1.1", b"1.0"):
        told, _, events = send(tiny_server, asked.replace(b"HTTP/1.1", b"HTTP/" + version)).partition(b"\r\n\r\n")
        assert (b"transfer-encoding: chunked" in told) is (version == b"1.1")
        assert b"connection: close" in told
        streams.append(b"".join(re.findall(rb'"text":"(.*?)"', events)))
    assert streams[0] == streams[1] != b""
    assert re.fullmatch(rb"(data: .*\n\n)+", events)
    assert events.endswith(b"data: [DONE]\n\n")


def test_a_head_is_answered_with_a_head(null_server):
    with null_server.connect() as connection:
        connection.sendall(HEALTH.replace(b"GET", b"HEAD"))
        assert read_until(connection, b"\r\n\r\n").endswith(b"\r\n\r\n")
        connection.sendall(head(method=b"HEAD"))
        assert statuses(read_until(connection, b"\r\n\r\n")) == [405]
        connection.sendall(HEALTH)
        assert read_until(connection, b"}").endswith(b'{"status":"alive"}')


def is_fine(server):
    assert server.post("/v1/completions", prompt="hello", max_tokens=3)[0] == 200
    server.until(lambda: server.flow.ledger.counters()["in_flight"] == 0)
    server.check_free()


@pytest.fixture
def quick(serve):
    """A server that waits for nobody longer than a moment."""
    with serve(
        "operators.source.read_timeout_s=0.3",
        "operators.source.write_timeout_s=0.3",
        "operators.source.max_body_bytes=2000",
        "operators.source.max_connections=8",
    ) as server:
        yield server


def test_half_a_head_times_out(quick):
    answer = send(quick, b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-a: ")
    assert statuses(answer) == [408]
    assert b'"code":"read_timeout"' in answer
    is_fine(quick)


def test_saying_nothing_times_out(quick):
    assert statuses(send(quick, b"")) == [408]


def test_a_head_in_single_bytes_times_out(quick):
    with quick.connect() as connection:
        for byte in HEALTH[:10]:
            connection.sendall(bytes((byte,)))
            time.sleep(0.02)  # it trickles
        assert statuses(read_all(connection)) == [408]


def test_blank_lines_between_requests_keep_nothing_open(quick):
    with quick.connect() as connection:
        connection.sendall(HEALTH)
        assert statuses(read_until(connection, b"alive")) == [200]
        connection.sendall(b"\r\n")
        read_all(connection)


def test_half_a_request_behind_one_that_is_answered_ends_nothing_but_itself(quick):
    with quick.connect() as connection:
        connection.sendall(head(length=len(ENDLESS)) + ENDLESS)
        read_until(connection, b"data: ")
        (served,) = quick.source.server._server.server_state.connections
        connection.sendall(b"\r\nGET /hea")
        quick.until(lambda: served._read_timer is not None)
        quick.call(served._head_is_late)
        assert not served.transport.is_closing()
        read_until(connection, b"data: ")
    is_fine(quick)


@pytest.mark.parametrize("late", [b"0123456789", b"0123456789GET /hea"])
def test_a_body_that_comes_when_its_request_has_been_answered_keeps_nothing_open(quick, late):
    with quick.connect() as connection:
        connection.sendall(head(b"/nope", length=10))
        assert statuses(read_until(connection, b"not_found")) == [404]
        connection.sendall(late)
        read_all(connection)


def test_half_a_head_that_comes_with_a_whole_request_times_out(quick):
    assert statuses(send(quick, HEALTH + HEALTH[:-10])) == [200, 408]


def test_trailers_are_not_kept(quick):
    with quick.connect() as connection:
        connection.sendall(head(b"/v1/completions", None, b"transfer-encoding: chunked"))
        connection.sendall(b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY) + b"a: b\r\n" * 1000)
        quick.until(lambda: quick.source.server._server.server_state.connections)
        (served,) = quick.source.server._server.server_state.connections
        connection.sendall(b"\r\n")
        assert statuses(read_until(connection, b"usage")) == [200]
        assert len(served.headers) < 10


def test_too_many_requests_in_a_row_are_not_kept(quick):
    with quick.connect() as connection:
        connection.sendall(head(length=len(ENDLESS)) + ENDLESS)
        read_until(connection, b"data: ")
        (served,) = quick.source.server._server.server_state.connections
        connection.sendall(HEALTH * 5000)
        read_all(connection)
        assert len(served.pipeline) <= 64
    is_fine(quick)


@pytest.mark.parametrize("came", [0, 5])
def test_half_a_body_times_out(quick, came):
    answer = send(quick, head(length=len(BODY)) + BODY[:came])
    assert statuses(answer) == [408]
    assert b'"code":"read_timeout"' in answer
    is_fine(quick)


@pytest.mark.parametrize("send_it", [True, False])
def test_a_body_that_is_too_long(quick, send_it):
    with quick.connect() as connection:
        connection.sendall(head(length=100_000) + (b"x" * 100_000 if send_it else b""))
        answer = read_until(connection, b"body_too_large")
        assert statuses(answer) == [413]
        if send_it:
            connection.sendall(HEALTH)  # the connection lives
            assert statuses(read_until(connection, b"alive")) == [200]
        else:
            read_all(connection)  # and is closed where the rest never comes
    is_fine(quick)


def test_a_chunked_body_that_is_too_long(quick):
    with quick.connect() as connection:
        connection.sendall(head(b"/v1/completions", None, b"transfer-encoding: chunked"))
        connection.sendall((b"400\r\n" + b"x" * 1024 + b"\r\n") * 3)
        assert statuses(read_until(connection, b"body_too_large")) == [413]
    is_fine(quick)


def test_a_chunked_body_is_read(quick):
    with quick.connect() as connection:
        connection.sendall(head(b"/v1/completions", None, b"transfer-encoding: chunked"))
        for at in range(0, len(BODY), 7):
            part = BODY[at : at + 7]
            connection.sendall(b"%x\r\n%b\r\n" % (len(part), part))
        connection.sendall(b"0\r\n\r\n")
        assert statuses(read_until(connection, b"usage")) == [200]


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS hello
        b"hello?\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999999999999999\r\n\r\n",
        head(b"/v1/completions", None, b"transfer-encoding: chunked") + b"zz\r\n",
        head(b"/v1/completions", None, b"transfer-encoding: chunked") + b"-5\r\nabc",
        b"GET /health HTTP/1.1\r\nhost: x\r\nx y: z\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused(quick, data):
    answer = send(quick, data)
    assert all(status in (400, 404, 408) for status in statuses(answer)), answer
    assert b"Traceback" not in answer
    is_fine(quick)


def test_headers_without_end_are_refused(quick):
    with quick.connect() as connection:
        try:
            for _ in range(1000):
                connection.sendall(b"GET /health HTTP/1.1\r\n" if not _ else b"x-%d: %b\r\n" % (_, b"v" * 1000))
        except (ConnectionResetError, BrokenPipeError):
            pass
        assert statuses(read_all(connection)) in ([431], [])
    is_fine(quick)


def test_pipelined_requests_are_answered_in_order(quick):
    with quick.connect() as connection:
        connection.sendall(GOOD + HEALTH + GOOD)
        answer = b""
        while answer.count(b"HTTP/1.1 200") < 3 or answer.count(b"usage") < 2:
            answer += connection.recv(65536)
    first, second, third = answer.split(b"HTTP/1.1 200 OK")[1:]
    assert b"text_completion" in first
    assert b"alive" in second
    assert b"text_completion" in third


def test_garbage_behind_a_request_does_not_mix_into_its_answer(quick):
    answer = send(quick, head(length=len(ENDLESS)) + ENDLESS + b"\x00\x01garbage\r\n\r\n")
    assert statuses(answer) in ([200], [])
    assert b"invalid_http" not in answer
    quick.until(lambda: quick.flow.ledger.counters()["in_flight"] == 0)
    is_fine(quick)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_everything(quick, stream):
    body = ENDLESS if stream else ENDLESS.replace(b', "stream": true', b"")
    with quick.connect() as connection:
        connection.sendall(head(length=len(body)) + body)
        if stream:
            read_until(connection, b"data: ")
        quick.until(lambda: quick.services.worker.num_running == 1)
    quick.until(lambda: quick.flow.ledger.counters()["in_flight"] == 0)
    assert quick.flow.ledger.counters()["cancelled"] == 1
    is_fine(quick)


def test_a_client_that_does_not_read_is_cut_off_and_holds_nobody_up(quick):
    (server,) = quick.source.server._server.servers
    server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # for each connection: it is soon full
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", quick.port))
    with connection:
        many = ENDLESS.replace(b"{", b'{"n": 8, ')
        connection.sendall(head(length=len(many)) + many)
        quick.until(lambda: quick.services.worker.num_running == 1)
        assert quick.post("/v1/completions", prompt="hello", max_tokens=3)[0] == 200
        quick.until(lambda: quick.flow.ledger.counters()["in_flight"] == 0)
        assert b"[DONE]" not in read_all(connection)
    is_fine(quick)


def test_who_leaves_with_half_a_request_behind_one_that_is_answered_is_no_error_of_the_servers(quick, caplog):
    with quick.connect() as connection:
        connection.sendall(head(length=len(ENDLESS)) + ENDLESS + GOOD[:-10])
        read_until(connection, b"data: ")
    quick.until(lambda: quick.flow.ledger.counters()["in_flight"] == 0)
    is_fine(quick)
    assert not caplog.records


def test_one_connection_too_many_is_refused(quick):
    held = [quick.connect() for _ in range(8)]
    try:
        quick.until(lambda: len(quick.source.server._server.server_state.connections) == 8)
        assert statuses(send(quick, HEALTH)) == [503]
    finally:
        for connection in held:
            connection.close()
    quick.until(lambda: not quick.source.server._server.server_state.connections)
    is_fine(quick)


def test_an_unknown_upgrade_goes_on_as_it_is(quick):
    with quick.connect() as connection:
        upgrade = (b"connection: upgrade, http2-settings", b"upgrade: h2c", b"http2-settings: AAMAAABk")
        connection.sendall(head(b"/v1/completions", len(BODY), *upgrade) + BODY)
        assert statuses(read_until(connection, b"usage")) == [200]


def test_expect_100_continue(quick):
    with quick.connect() as connection:
        connection.sendall(head(b"/v1/completions", len(BODY), b"expect: 100-continue"))
        assert read_until(connection, b"\r\n\r\n").startswith(b"HTTP/1.1 100")
        connection.sendall(BODY)
        assert statuses(read_until(connection, b"usage")) == [200]
        connection.sendall(head(b"/v1/completions", 10**9, b"expect: 100-continue"))
        assert statuses(read_until(connection, b"body_too_large")) == [413]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.one_of(st.binary(max_size=200), st.builds(lambda a, b, c: GOOD[:a] + b + GOOD[c:], st.integers(0, 150),
                      st.binary(max_size=20), st.integers(0, 150))))  # fmt: skip
def test_any_bytes_get_an_answer_or_an_end(null_server, data):
    with null_server.connect() as connection:
        connection.sendall(data)
        connection.shutdown(1)
        answer = read_all(connection)
    assert all(100 <= status < 500 for status in statuses(answer)), answer


def test_after_all_that_it_is_fine(null_server):
    is_fine(null_server)
