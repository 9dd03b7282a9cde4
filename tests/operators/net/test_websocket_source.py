"""websocket_source: as tcp_source, in WebSocket messages."""

from __future__ import annotations

import json
import logging

import anyio
import msgpack
import pytest
from websockets.client import ClientProtocol
from websockets.frames import Opcode
from websockets.uri import parse_uri

HI = {"prompt": "hi", "max_new_tokens": 3}


class WebClient:
    """A client of the library's, over a connection of the test's."""

    def __init__(self, stream, **headers):
        self.stream = stream
        self.protocol = ClientProtocol(parse_uri("ws://localhost/"), origin=headers.pop("Origin", None))
        request = self.protocol.connect()
        request.headers.update(headers)
        self.protocol.send_request(request)
        self.events = []

    async def shake_hands(self):
        """The response: None if the server has taken the connection, else its status and text."""
        await self.flush()
        response = await self._next()
        return None if response.status_code == 101 else (response.status_code, bytes(response.body).decode())

    async def flush(self):
        data = b"".join(self.protocol.data_to_send())
        if data:
            await self.stream.send(data)

    async def send(self, *messages, pack=False):
        for message in messages:
            if pack:
                self.protocol.send_binary(msgpack.packb(message))
            else:
                self.protocol.send_text(json.dumps(message).encode())
        await self.flush()

    async def _next(self):
        while not self.events:
            self.protocol.receive_data(await self.stream.receive())
            self.events += self.protocol.events_received()
            await self.flush()
        return self.events.pop(0)

    async def receive(self):
        """The next event, or the code and reason of the server's goodbye."""
        while True:
            frame = await self._next()
            if frame.opcode is Opcode.TEXT:
                return json.loads(frame.data)
            if frame.opcode is Opcode.BINARY:
                return {**msgpack.unpackb(frame.data), "packed": True}
            if frame.opcode is Opcode.CLOSE:
                return self.protocol.close_rcvd.code, self.protocol.close_rcvd.reason

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await anyio.aclose_forcefully(self.stream)


@pytest.fixture
def serve_web(serve):
    """As `serve`; `body` is given a function that connects."""

    def run(body, source=None, **options):
        async def with_connect(server):
            async def connect(**headers):
                return WebClient((await server.connect()).stream, **headers)

            await body(server, connect)

        serve(with_connect, {"type": "websocket_source", "port": 0, **(source or {})}, **options)

    return run


def test_text_is_answered_in_text_and_binary_in_binary(serve_web):
    async def body(server, connect):
        assert server.source.address.startswith("ws://")
        async with await connect() as client:
            assert await client.shake_hands() is None
            await client.send({**HI, "id": "a"})
            event = await client.receive()
            assert (event["event"], event["request_id"], "packed" in event) == ("done", "a", False)
            await client.send({**HI, "id": "b", "stream": True}, pack=True)
            while (event := await client.receive())["event"] == "delta":
                assert event["packed"]
            assert (event["event"], event["request_id"], event["packed"]) == ("done", "b", True)

    serve_web(body)


def test_a_bad_message_is_an_error_and_the_connection_lives(serve_web):
    async def body(server, connect):
        async with await connect() as client:
            await client.shake_hands()
            await client.send([1])
            assert (await client.receive())["message"] == 1
            await client.send({"prompt": 1, "id": "a"}, pack=True)
            event = await client.receive()
            assert (event["request_id"], event["packed"]) == ("a", True)
            await client.send({**HI, "id": "b"})
            assert (await client.receive())["event"] == "done"

    serve_web(body)


@pytest.mark.parametrize("how", ["goodbye", "cut"])
def test_who_goes_has_its_requests_cancelled(serve_web, endless, how):
    async def body(server, connect):
        client = await connect()
        await client.shake_hands()
        await client.send(endless("a"))
        await server.until(lambda: server.services.num_running == 1)
        if how == "goodbye":
            client.protocol.send_close(1000)
            await client.flush()
            assert (await client.receive())[0] == 1000
        else:
            await client.stream.send_eof()  # half a WebSocket is none
        await server.until(lambda: server.counts.get("cancelled") == 1)
        await client.__aexit__()

    serve_web(body)


def test_a_message_that_is_too_long_closes_the_connection(serve_web):
    async def body(server, connect):
        async with await connect() as client:
            await client.shake_hands()
            await client.send({"prompt": "x" * 2000})
            assert (await client.receive())[0] == 1009

    serve_web(body, {"max_message_bytes": 1000})


@pytest.mark.parametrize(
    ("origins", "origin", "status"),
    [([], None, None), ([], "https://evil.example", 403), (["https://a.example"], "https://a.example", None),
     (["https://a.example"], "https://b.example", 403)],
)  # fmt: skip
def test_web_pages_may_connect_only_from_listed_origins(serve_web, origins, origin, status):
    async def body(server, connect):
        async with await connect(**({"Origin": origin} if origin else {})) as client:
            answer = await client.shake_hands()
            assert (answer and answer[0]) == status

    serve_web(body, {"origins": origins})


@pytest.fixture
def keys(tmp_path):
    (tmp_path / "keys.yaml").write_text("- {key: sesame, name: alice}")
    return {"keys": "keys.yaml"}


def test_the_key_comes_in_the_handshake(serve_web, keys, caplog):
    caplog.set_level(logging.DEBUG)

    async def body(server, connect):
        async with await connect(Authorization="Bearer sesame") as client:
            assert await client.shake_hands() is None
            await client.send({**HI, "id": "a"})
            assert (await client.receive())["event"] == "done"
        for headers in ({}, {"Authorization": "Bearer wrong-one"}, {"Authorization": "sesame"}):
            async with await connect(**headers) as client:
                status, text = await client.shake_hands()
                assert status == 401
                assert "Authorization: Bearer" in text

    serve_web(body, keys)
    told = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("sageLLM"))
    assert "sesame" not in told
    assert "wrong-one" not in told


def test_one_connection_too_many_is_told_so(serve_web):
    async def body(server, connect):
        async with await connect() as client, await connect() as refused:
            await client.shake_hands()
            status, text = await refused.shake_hands()
            assert (status, text) == (503, "1 connections are open, as many as are served\n")

    serve_web(body, {"max_connections": 1})


def test_what_is_no_websocket_is_turned_away(serve_web):
    async def body(server, connect):
        for said, answer in ((b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"426"), (b"\x16\x03nonsense\r\n\r\n", b"")):
            async with await connect() as client:
                await client.stream.send(said)
                received = b""
                try:
                    while True:
                        received += await client.stream.receive()
                except anyio.EndOfStream:
                    pass
                assert answer in received

    serve_web(body)


def test_a_peer_that_answers_no_ping_is_gone(serve_web, endless):
    async def body(server, connect):
        async with await connect() as client:
            await client.shake_hands()
            await client.send(endless("a"))
            await server.until(lambda: server.counts.get("cancelled") == 1)

    serve_web(body, {"keepalive_s": 1})


def test_draining_says_goodbye(serve_web):
    async def body(server, connect):
        client = await connect()
        await client.shake_hands()
        await client.send({**HI, "id": "a"})
        assert (await client.receive())["event"] == "done"
        server.flow.drain("SIGTERM")
        assert await client.receive() == (1001, "the server is shutting down")
        await client.__aexit__()

    serve_web(body)
