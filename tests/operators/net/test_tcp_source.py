"""tcp_source: requests from connections, answered there, whatever the peers do."""

from __future__ import annotations

import logging
import socket
import ssl
import struct
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from anyio.abc import SocketAttribute
from anyio.streams.tls import TLSStream

from sageLLM.errors import ConfigError
from sageLLM.operators.sinks.reply_format import delta_fields
from sageLLM.operators.sources.net import connection
from sageLLM.operators.sources.net.tls import client_context
from sageLLM.records import Request, SamplingParams, Sequence, TokenDelta, ToolCall

HI = {"prompt": "hi", "max_new_tokens": 3}
CERTIFICATES = Path(__file__).parent / "certificates"


@pytest.mark.parametrize("framing", ["json_lines", "msgpack"])
def test_many_requests_in_flight_on_one_connection_each_get_their_answer(serve, framing):
    async def body(server):
        async with await server.connect(framing) as client:
            await client.send(*({"id": f"r{n}", "prompt": "x" * (n + 1), "max_new_tokens": 4} for n in range(50)))
            ends = await client.ends(50)
            assert {event["event"] for event in ends.values()} == {"done"}
            assert ends["r7"]["usage"] == {"prompt_tokens": 8, "completion_tokens": 4, "total_tokens": 12}
            assert "src" not in ends["r7"]

    serve(body, {"framing": framing})


def test_deltas_of_a_streaming_request_and_then_its_end(serve):
    async def body(server):
        async with await server.connect() as client:
            await client.send({**HI, "id": "a", "stream": True})
            events = [await client.receive()]
            while events[-1]["event"] == "delta":
                events.append(await client.receive())
            assert "".join(event["text"] for event in events[:-1]) == events[-1]["text"]
            assert len(events) > 2
            assert events[-1]["event"] == "done"

    serve(body)


@pytest.mark.parametrize("framing", ["json_lines", "msgpack"])
def test_an_embedding(serve, framing):
    async def body(server):
        async with await server.connect(framing) as client:
            await client.send({"prompt_tokens": [5, 3], "pooling": "last"})
            event = await client.receive()
            assert event["embedding"] == [float(axis == 3) for axis in range(16)]
            assert (event["event"], event["finish_reason"], event["usage"]["total_tokens"]) == ("done", "stop", 2)

    serve(body, {"framing": framing})


def test_a_delta_tells_the_calls_that_end_in_it():
    delta = TokenDelta(Sequence(Request("a"), None, SamplingParams()), 0, [7], "", [ToolCall("call_1", "add", "{}")])
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    assert delta_fields(delta)["tool_calls"] == [call]
    delta.tool_calls = []
    assert "tool_calls" not in delta_fields(delta)


def test_a_request_without_an_id_is_numbered_by_connection(serve):
    async def body(server):
        for _ in range(2):
            async with await server.connect() as client:
                await client.send(HI, HI)
                assert set(await client.ends(2)) == {"request-1", "request-2"}

    serve(body)


def test_cancel_ends_a_request_and_gives_what_there_was(serve, endless):
    async def body(server):
        async with await server.connect() as client:
            await client.send(endless("a", stream=True), {"cancel": "unknown"})
            assert (await client.receive())["event"] == "delta"
            await client.send({"cancel": "a"})
            end = (await client.ends(1))["a"]
            assert (end["event"], end["finish_reason"]) == ("cancelled", "cancelled")
            assert end["usage"]["completion_tokens"] > 0

    serve(body)


# -- peers that go, or are rude -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_connection_cut_cancels_its_requests_and_frees_their_blocks(serve, endless, how):
    async def body(server):
        other = await server.connect()
        client = await server.connect()
        await client.send(endless("a"), endless("b"))
        await server.until(lambda: server.services.num_running == 2)
        if how == "reset":
            raw = client.stream.extra(SocketAttribute.raw_socket)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await client.close()
        await server.until(lambda: server.services.num_running == 0)
        assert server.services.leases.free_slots == server.services.leases.num_slots
        await server.until(lambda: server.counts.get("cancelled") == 2)
        await other.send({**HI, "id": "a"})
        assert (await other.ends(1))["a"]["event"] == "done"
        await other.close()

    serve(body)


def test_a_peer_that_has_ended_its_side_still_gets_its_answers(serve):
    async def body(server):
        async with await server.connect() as client:
            await client.send(*({**HI, "id": f"r{n}", "max_new_tokens": 400} for n in range(5)))
            await client.stream.send(b'{"prompt": "no newline", "id": "last"}')
            await client.stream.send_eof()
            events = await client.receive_until_end()
            assert sorted((event["request_id"], event["event"]) for event in events) == [
                ("last", "done"), *((f"r{n}", "done") for n in range(5)),
            ]  # fmt: skip

    serve(body)


def test_a_line_that_is_no_request_is_an_error_and_the_connection_lives(serve):
    async def body(server):
        async with await server.connect() as client:
            await client.stream.send(b'nonsense\n\n{"prompt": 5, "id": "a"}\n%b\n\xff\xfe\n' % (b"x" * 3000))
            await client.send({**HI, "id": "b"})
            told = [await client.receive() for _ in range(4)]
            assert [(event["event"], event["request_id"], event["message"]) for event in told] == [
                ("error", None, 1), ("error", "a", 3), ("error", None, 4), ("error", None, 5),
            ]  # fmt: skip
            assert told[0]["error"].startswith("not JSON")
            assert "prompt: found 5" in told[1]["error"]
            assert told[2]["error"] == "the line has 3000 bytes, max_message_bytes is 1000"
            assert "not UTF-8" in told[3]["error"]
            assert (await client.ends(1))["b"]["event"] == "done"
        assert server.counts["accepted"] == 1  # others' bad lines do not count against the pipeline

    serve(body, {"max_message_bytes": 1000})


def test_a_message_that_is_no_msgpack_is_an_error_and_the_connection_lives(serve):
    async def body(server):
        async with await server.connect("msgpack") as client:
            await client.stream.send(b"\0\0\0\1\xc1" + b"\0\0\x10\0" + b"x" * 4096)
            await client.send([1, 2], {**HI, "id": "b"})
            told = [await client.receive() for _ in range(3)]
            assert [event["message"] for event in told] == [1, 2, 3]
            assert told[0]["error"].startswith("not MessagePack")
            assert told[1]["error"] == "the message has 4096 bytes, max_message_bytes is 1000"
            assert told[2]["error"].startswith("found a list: write a map")
            assert (await client.ends(1))["b"]["event"] == "done"

    serve(body, {"max_message_bytes": 1000, "framing": "msgpack"})


def test_who_sends_garbage_lets_everybody_else_have_a_turn(serve, monkeypatch):
    turns = []

    async def body(server):
        read = connection.read_message
        monkeypatch.setattr(connection, "read_message", lambda *args: turns.append(0) or read(*args))
        async with await server.connect() as rude, anyio.create_task_group() as tasks:
            await rude.stream.send(b"1\n" * 3000)
            longest = at = 0
            while len(turns) < 3000:
                await anyio.lowlevel.checkpoint()
                longest, at = max(longest, len(turns) - at), len(turns)
            assert longest <= 64
            tasks.cancel_scope.cancel()

    serve(body, {"buffer_bytes": 10_000_000})


def test_an_id_that_is_in_flight_is_refused_and_the_first_one_goes_on(serve, endless):
    async def body(server):
        async with await server.connect() as client, await server.connect() as other:
            await client.send(endless("a"), {**HI, "id": "a"}, {"prompt": 5, "id": "a"})
            told = [await client.receive() for _ in range(2)]
            assert [event["request_id"] for event in told] == [None, None]
            assert "'a' is in flight already" in told[0]["error"]
            await other.send({**HI, "id": "a"})  # another connection's ids are its own
            assert (await other.ends(1))["a"]["event"] == "done"
            await client.send({"cancel": "a"})
            assert (await client.ends(1))["a"]["event"] == "cancelled"
            await client.send({**HI, "id": "a"})
            assert (await client.ends(1))["a"]["event"] == "done"

    serve(body)


def test_a_slow_reader_is_cut_off_and_nobody_waits_for_it(serve, endless):
    async def body(server):
        for listening in server.source._sockets:  # else the system's own buffers take megabytes
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1024)
        slow, quick = await server.connect(), await server.connect()
        slow.stream.extra(SocketAttribute.raw_socket).setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        await slow.send(*(endless(f"s{n}", stream=True) for n in range(4)))
        await quick.send(*({**HI, "id": f"q{n}"} for n in range(8)))
        assert {event["event"] for event in (await quick.ends(8)).values()} == {"done"}
        await server.until(lambda: server.counts.get("cancelled") == 4)
        await slow.close()
        await quick.close()

    serve(body, {"write_timeout_s": 0.2, "buffer_bytes": 1000})


def test_one_connection_too_many_is_told_so_and_closed(serve):
    async def body(server):
        async with await server.connect() as client:
            await client.send({**HI, "id": "a"})
            await client.ends(1)
            async with await server.connect() as refused:
                (event,) = await refused.receive_until_end()
                assert event["error"] == "1 connections are open, as many as are served"
        await server.until(lambda: not server.source._connections)
        async with await server.connect() as client:
            await client.send({**HI, "id": "a"})
            assert (await client.ends(1))["a"]["event"] == "done"

    serve(body, {"max_connections": 1})


def test_in_a_flood_of_connections_not_everybody_is_told(serve, monkeypatch):
    monkeypatch.setattr("sageLLM.operators.sources.net.socket_source._REFUSED_AT_ONCE", 1)

    async def body(server):
        async with await server.connect() as client, await server.connect() as told:
            assert len(await told.receive_until_end()) == 1  # and stays for a moment
            async with await server.connect() as flooding:
                assert await flooding.receive_until_end() == []
            await client.send({**HI, "id": "a"})
            assert (await client.ends(1))["a"]["event"] == "done"

    serve(body, {"max_connections": 1})


def test_who_says_nothing_for_long_is_let_go_but_not_while_it_waits(serve, endless):
    async def body(server):
        async with await server.connect() as idle, await server.connect() as waiting:
            await waiting.send(endless("a"))
            (event,) = await idle.receive_until_end()
            assert event["error"] == "nothing came for 0.1 s"
            await waiting.send({"cancel": "a"})
            assert (await waiting.ends(1))["a"]["event"] == "cancelled"

    serve(body, {"idle_timeout_s": 0.1})


def test_a_failure_in_one_connection_stays_there(serve, endless, monkeypatch, caplog):
    from sageLLM.operators.sources.net import connection

    read = connection.read_message

    def stumble(frame, default_id):
        if b"stumble" in frame.data:
            raise ZeroDivisionError("a bug")
        return read(frame, default_id)

    monkeypatch.setattr(connection, "read_message", stumble)

    async def body(server):
        async with await server.connect() as client, await server.connect() as other:
            await client.send(endless("a"), {"prompt": "stumble"})
            assert await client.receive_until_end() == []
            await server.until(lambda: server.counts.get("cancelled") == 1)
            await other.send({**HI, "id": "b"})
            assert (await other.ends(1))["b"]["event"] == "done"

    serve(body)
    assert "failed" in caplog.text


def test_an_answer_that_cannot_be_written_cuts_its_connection_only(serve, monkeypatch, caplog):
    from sageLLM.operators.sources.net import framing

    encode = framing.JsonLines.encode

    def stumble(self, fields, as_msgpack):
        if fields["request_id"] == "stumble":
            raise ZeroDivisionError("a bug")
        return encode(self, fields, as_msgpack)

    monkeypatch.setattr(framing.JsonLines, "encode", stumble)

    async def body(server):
        async with await server.connect() as client, await server.connect() as other:
            await client.send({**HI, "id": "stumble"})
            with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                await client.receive()
            await other.send({**HI, "id": "b"})
            assert (await other.ends(1))["b"]["event"] == "done"

    serve(body)
    assert "cannot be written" in caplog.text


def test_the_operating_system_looks_for_peers_whose_machine_is_gone(serve):
    async def body(server):
        async with await server.connect() as client:
            await client.send(HI)
            await client.ends(1)
            (connection,) = server.source._connections
            raw = connection._stream.extra(SocketAttribute.raw_socket)
            assert raw.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            idle, every, times = (
                raw.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            assert idle + every * times <= 2 * 12

    serve(body, {"keepalive_s": 12})


# -- overload, keys, TLS --------------------------------------------------------------------------------------------


def test_more_than_max_in_flight_is_shed_with_the_queue_depth(serve, endless):
    async def body(server):
        async with await server.connect() as client:
            await client.send(endless("a"), endless("b"), {**HI, "id": "c"})
            event = await client.receive()
            assert (event["event"], event["request_id"], event["retry_after_s"]) == ("shed", "c", 1)
            assert 0 <= event["queue_depth"] <= 2
            await client.send({"cancel": "a"})
            await client.ends(1)
            await client.send({**HI, "id": "c"}, {"cancel": "b"})
            ends = await client.ends(2)
            assert (ends["c"]["event"], ends["b"]["event"]) == ("done", "cancelled")
        assert server.counts == {"accepted": 4, "done": 1, "cancelled": 2, "shed": 1}

    serve(body, {"max_in_flight": 2})


def test_who_waits_too_long_gets_a_timeout(serve, endless):
    async def body(server):
        async with await server.connect() as client:
            await client.send(endless("a"))
            assert (await client.ends(1))["a"]["event"] == "timeout"

    serve(body, engine={"scheduler": {"request_timeout_s": 0.05}})


def test_a_bad_request_that_only_the_model_can_judge_is_its_error(serve):
    async def body(server):
        async with await server.connect() as client:
            await client.send({"prompt_tokens": [10**6], "id": "a"})
            event = (await client.ends(1))["a"]
            assert event["event"] == "error"
            assert "not in the vocabulary" in event["error"]

    serve(body)


@pytest.fixture
def keys(tmp_path):
    (tmp_path / "keys.yaml").write_text("- {key: sesame, name: alice, max_in_flight: 1}")
    return {"keys": "keys.yaml"}


def test_with_keys_the_first_message_must_be_one(serve, keys, endless):
    async def body(server):
        async with await server.connect() as client:
            await client.send({"authorization": "Bearer sesame"}, endless("a", tenant="bob"), {**HI, "id": "b"})
            event = await client.receive()
            assert (event["event"], event["request_id"]) == ("shed", "b")
            assert "the key has 1 requests in flight" in event["error"]
            (request,) = server.source._connections.copy().pop()._requests.values()
            assert request.tenant == "alice"
            await client.send({"cancel": "a"})
            await client.ends(1)

    serve(body, keys)


@pytest.mark.parametrize(
    "first", [{"authorization": "Bearer wrong-one"}, {**HI, "id": "a"}, {"cancel": "a"}, {"key": "wrong-one"}]
)
def test_who_has_no_key_is_told_so_and_closed(serve, keys, first, caplog):
    caplog.set_level(logging.DEBUG)

    async def body(server):
        async with await server.connect() as client:
            await client.send(first, HI)
            (event,) = await client.receive_until_end()
            assert event["request_id"] is None
            assert "key" in event["error"]
        assert "accepted" not in server.counts

    serve(body, keys)
    assert "turned away" in caplog.text
    assert "wrong-one" not in caplog.text
    assert "sesame" not in caplog.text


def test_who_shows_no_key_in_time_is_closed(serve, keys):
    async def body(server):
        async with await server.connect() as client:
            (event,) = await client.receive_until_end()
            assert "did not come in time" in event["error"]

    serve(body, {**keys, "handshake_timeout_s": 0.05})


TLS = {"tls": {"cert": str(CERTIFICATES / "server.pem"), "key": str(CERTIFICATES / "server.key")}}


def test_tls(serve):
    async def body(server):
        assert server.source.address.startswith("tcps://")
        client = await server.connect()
        client.stream = await TLSStream.wrap(
            client.stream, hostname="localhost", ssl_context=client_context(str(CERTIFICATES / "ca.pem"), Path())
        )
        await client.send({**HI, "id": "a"})
        assert (await client.ends(1))["a"]["event"] == "done"
        await client.stream.aclose()

    serve(body, TLS)


def test_a_tls_handshake_that_never_comes_hurts_nobody(serve):
    async def body(server):
        async with await server.connect() as silent, await server.connect() as plain:
            await plain.send(HI)
            with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                while True:
                    await plain.stream.receive()
            with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                await silent.stream.receive()

    serve(body, {**TLS, "handshake_timeout_s": 0.2})


def test_a_tls_handshake_that_fails_hurts_nobody(serve):
    async def body(server):
        stranger = await server.connect()
        with pytest.raises(ssl.SSLError):
            await TLSStream.wrap(stranger.stream, hostname="localhost", ssl_context=client_context(None, Path()))
        await stranger.close()

    serve(body, TLS)


# -- the end --------------------------------------------------------------------------------------------------------


def test_draining_answers_what_is_in_flight_and_sheds_what_comes(serve, endless):
    async def body(server):
        client = await server.connect()
        await client.send({**HI, "id": "a", "max_new_tokens": 500}, endless("b"))
        await server.until(lambda: server.services.num_running == 2)
        server.flow.drain("SIGTERM")
        await client.send({**HI, "id": "c"})
        ends = await client.ends(2)
        assert ends["c"]["event"] == "shed"
        assert ends["c"]["error"] == "the server is shutting down"
        assert ends["a"]["event"] == "done"
        with pytest.raises(OSError):
            await server.connect()
        await client.send({"cancel": "b"})
        assert [event["event"] for event in await client.receive_until_end()] == ["cancelled"]
        await client.close()

    serve(body)


def test_what_is_not_done_by_the_deadline_is_cancelled(serve, endless):
    async def body(server):
        client = await server.connect()
        await client.send(endless("a"))
        await server.until(lambda: server.services.num_running == 1)
        server.flow.drain("SIGTERM")
        (event,) = await client.receive_until_end()
        assert event["event"] == "cancelled"
        await client.close()

    serve(body, {"drain_timeout_s": 0.05})


def test_when_the_flow_is_aborted_everybody_is_told(serve, endless):
    async def body(server):
        client = await server.connect()
        await client.send(endless("a"))
        await server.until(lambda: server.services.num_running == 1)
        server.flow.abort("the test says so")
        (event,) = await client.receive_until_end()
        assert (event["event"], event["error"]) == ("error", "the server was stopped before the request had ended")
        await client.close()

    serve(body, drains=False)


def test_a_second_server_on_the_same_port_is_one_clear_error(serve):
    async def body(server):
        port = int(server.source.address.rpartition(":")[2])
        with pytest.raises(ConfigError, match=rf"tcp://127\.0\.0\.1:{port} is in use"):
            await type(server.source)(
                server.source.config.model_copy(update={"port": port}), server.source.context
            ).open()

    serve(body)
