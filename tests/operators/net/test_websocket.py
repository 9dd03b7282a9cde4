"""WebSocket framing: any bytes give messages or the end of the connection, however they are cut."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.frames import Frame as Piece
from websockets.frames import Opcode
from websockets.uri import parse_uri

from sageLLM.operators.sources.net.messages import MessageError, read_message
from sageLLM.operators.sources.net.websocket import WebSocketClient, WebSocketServer

HELLO = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)

pieces = st.builds(
    lambda opcode, data, fin: Piece(opcode, data, fin or opcode >= Opcode.CLOSE).serialize(mask=True),
    st.sampled_from(Opcode),
    st.binary(max_size=60) | st.sampled_from([b'{"prompt": "hi"}', b'{"cancel": "a"}', b"\x03\xe8"]),
    st.booleans(),
)
streams = st.lists(pieces | st.binary(max_size=20), max_size=6).map(b"".join)


def serve(chunks):
    """What the server's side makes of these bytes: its messages, whether it is closed, and that it always answers."""
    server = WebSocketServer(50, [], lambda authorization: True)
    frames = []
    for chunk in chunks:
        frames += server.receive(chunk)
        assert isinstance(server.data_to_send(), bytes)
        if server.is_closed:
            break
    assert isinstance(server.goodbye("that was all"), bytes)
    assert server.encode({"event": "keepalive"}, False) == b""
    return frames, server.is_closed


@settings(deadline=None)
@given(data=streams, places=st.lists(st.integers(0, 600), max_size=8), hello=st.just(HELLO) | st.binary(max_size=40))
def test_any_bytes_give_the_same_messages_however_they_are_cut(data, places, hello):
    data = hello + data
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    whole = serve([data])
    assert serve([data[begin:end] for begin, end in pairwise(ends)]) == whole
    for frame in whole[0]:
        assert len(frame.data) <= 50
        try:
            read_message(frame, "default")
        except MessageError as error:
            assert str(error)


@pytest.mark.parametrize("as_msgpack", [False, True])
def test_both_sides_understand_each_other(as_msgpack):
    seen = []
    server = WebSocketServer(1000, [], lambda header: seen.append(header) or True)
    client = WebSocketClient(1000, parse_uri("ws://localhost/"), "Bearer k")
    assert server.receive(client.data_to_send()) == []
    assert client.receive(server.data_to_send()) == []
    assert seen == ["Bearer k"]
    assert client.is_ready
    (asked,) = server.receive(client.encode({"cancel": "a"}, as_msgpack))
    assert read_message(asked, "").request_id == "a"
    (told,) = client.receive(server.encode({"event": "keepalive"}, asked.is_msgpack))
    assert told.is_msgpack == as_msgpack
    client.receive(server.goodbye("that was all"))
    assert client.is_closed
    assert client.encode({"cancel": "a"}, as_msgpack) == b""


def test_who_is_refused_learns_why():
    server = WebSocketServer(1000, [], lambda header: True)
    client = WebSocketClient(1000, parse_uri("ws://localhost/"), None)
    client.receive(server.refuse({"error": "1 connections are open"}))
    assert client.is_closed
    assert client.rejection == "503 Service Unavailable: 1 connections are open"


def test_a_message_in_endless_empty_pieces_takes_no_room():
    server = WebSocketServer(50, [], lambda authorization: True)
    server.receive(HELLO + Piece(Opcode.TEXT, b"", False).serialize(mask=True))
    more = Piece(Opcode.CONT, b"", False).serialize(mask=True) * 1000
    tracemalloc.start()
    for _ in range(20):
        server.receive(more)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 20_000


def test_behind_what_is_no_handshake_nothing_is_looked_at(monkeypatch):
    server = WebSocketServer(50, [], lambda authorization: True)
    looked_at = []
    monkeypatch.setattr(server._protocol, "receive_data", _noting(looked_at, server._protocol.receive_data))
    server.receive(b"\n" * 10_000)
    assert server.is_closed
    assert len(looked_at) < 5


def _noting(notes, function):
    def call(data):
        notes.append(data)
        return function(data)

    return call
