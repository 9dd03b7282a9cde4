"""tcp_sink: results to another program, which may be slow, away, or gone for a while."""

from __future__ import annotations

import json
from pathlib import Path

import anyio
import pytest
from anyio.streams.tls import TLSListener

from sageLLM.errors import ConfigError, FlowError
from sageLLM.operators.sinks import tcp_sink
from sageLLM.operators.sinks.tcp_sink import TcpSink, TcpSinkConfig
from sageLLM.operators.sources.net.tls import TLSConfig, server_context
from sageLLM.records import DeadLetter, TokenDelta

CERTIFICATES = Path(__file__).parent / "certificates"


class Peer:
    """Takes connections one after another; `breaks` says after how many lines each is cut."""

    def __init__(self, acks=False, breaks=()):
        self.acks, self.breaks, self.connections = acks, [*breaks], []

    @property
    def texts(self):
        return [line["text"] for lines in self.connections for line in lines]

    async def serve(self, stream):
        lines, buffer = [], b""
        self.connections.append(lines)
        limit = self.breaks.pop(0) if self.breaks else None
        async with stream:
            try:
                while len(lines) != limit:
                    if b"\n" not in buffer:
                        buffer += await stream.receive()
                        continue
                    line, buffer = buffer.split(b"\n", 1)
                    lines.append(json.loads(line))
                    if self.acks:
                        await stream.send(b"ok\n")
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                pass


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(tcp_sink, "_FIRST_PAUSE_S", 0.01)


@pytest.fixture
def send(on_loop, make_context, outlet):
    """`send(lists, peer, **config)` runs a sink on these lists of records, and the peer."""

    def run(lists, peer, tls=None, **config):
        async def main():
            async def inlet():
                for records in lists:
                    yield records
                    await anyio.sleep(0.01)

            async with (
                await anyio.create_tcp_listener(local_host="127.0.0.1") as at,
                anyio.create_task_group() as tasks,
            ):
                port = at.listeners[0].extra(anyio.abc.SocketAttribute.local_port)
                tasks.start_soon((TLSListener(at, tls) if tls else at).serve, peer.serve)
                given = {"host": "localhost" if tls else "127.0.0.1", "tls": tls is not None, **config}
                sink = TcpSink(TcpSinkConfig(port=port, **given), make_context())
                await sink.open()
                try:
                    with anyio.fail_after(30):
                        await sink.run(inlet(), outlet())
                finally:
                    await sink.close()
                await anyio.sleep(0.05)
                tasks.cancel_scope.cancel()
                return sink

        return on_loop(main)

    return run


def test_each_result_is_a_line_and_deltas_are_none(send, make_completion, null_engine):
    peer = Peer()
    delta = TokenDelta(null_engine().sequence([1]), 0, [1])
    send([[make_completion(text="one"), delta], [make_completion(text="two")]], peer)
    assert peer.texts == ["one", "two"]
    assert set(peer.connections[0][0]) >= {"request_id", "text", "usage", "src"}
    assert len(peer.connections) == 1


def test_a_dead_letter_too(send):
    peer = Peer()
    send([[DeadLetter("too long", raw="x")]], peer)
    assert peer.connections[0][0]["error"] == "too long"


def test_with_acks_everything_comes_though_the_connection_breaks(send, make_completion):
    peer = Peer(acks=True, breaks=(2, 0, 1))
    texts = [f"t{n}" for n in range(9)]
    sink = send([[make_completion(text=text) for text in texts[n : n + 3]] for n in (0, 3, 6)], peer, acks=True)
    assert set(peer.texts) == {*texts}
    assert [
        text for n, text in enumerate(peer.texts) if text not in peer.texts[:n]
    ] == texts  # in order, but for repeats
    assert len(peer.connections) == 4
    assert sink.lost_lines == 0


def test_without_acks_nothing_comes_twice(send, make_completion):
    peer = Peer(breaks=(1, 1))
    texts = [f"t{n}" for n in range(5)]
    send([[make_completion(text=text)] for text in texts], peer)
    assert len(set(peer.texts)) == len(peer.texts)
    assert peer.texts[-1] == "t4"


def test_a_peer_that_is_away_is_waited_for_and_then_given_up(on_loop, make_context, make_completion, outlet, caplog):
    async def main():
        async with await anyio.create_tcp_listener(local_host="127.0.0.1") as at:
            port = at.listeners[0].extra(anyio.abc.SocketAttribute.local_port)
        sink = TcpSink(TcpSinkConfig(host="127.0.0.1", port=port, give_up_after_s=0.1), make_context())

        async def inlet():
            yield [make_completion()]

        await sink.open()
        with pytest.raises(BaseExceptionGroup) as caught:
            await sink.run(inlet(), outlet())
        assert caught.group_contains(FlowError, match=rf"127\.0\.0\.1:{port} could not be reached for 0.1 s")
        await sink.close()

    on_loop(main)
    assert "no connection" in caplog.text


def test_a_peer_that_takes_nothing_holds_the_pipeline_up_and_is_then_given_up(on_loop, send, make_completion):
    class Stuck(Peer):
        async def serve(self, stream):
            async with stream:
                await stream.receive(1)
                await anyio.sleep_forever()

    with pytest.raises(BaseExceptionGroup) as caught:
        send([[make_completion(text="x" * 100_000)] * 100], Stuck(), give_up_after_s=0.2)
    assert caught.group_contains(FlowError, match="has taken nothing for 0.2 s")


def test_a_peer_that_acknowledges_nothing_is_given_up(send, make_completion):
    with pytest.raises(BaseExceptionGroup) as caught:
        send([[make_completion()]], Peer(acks=False), acks=True, give_up_after_s=0.2)
    assert caught.group_contains(FlowError, match="has acknowledged nothing for 0.2 s")


def test_tls(send, make_completion):
    peer = Peer()
    tls = server_context(TLSConfig(cert="server.pem", key="server.key"), CERTIFICATES)
    send([[make_completion(text="one")]], peer, tls=tls, ca=str(CERTIFICATES / "ca.pem"))
    assert peer.texts == ["one"]


def test_a_peer_that_closes_in_the_tls_handshake_is_tried_again(send, make_completion, monkeypatch):
    peer, turned_away = Peer(), []
    connect = anyio.connect_tcp

    async def connect_in_vain_once(*args):
        stream = await connect(*args)
        if not turned_away:
            turned_away.append(stream)
            await stream.aclose()
        return stream

    monkeypatch.setattr(anyio, "connect_tcp", connect_in_vain_once)
    monkeypatch.setattr(tcp_sink, "keep_alive", lambda *_: None)
    tls = server_context(TLSConfig(cert="server.pem", key="server.key"), CERTIFICATES)
    send([[make_completion(text="one")]], peer, tls=tls, ca=str(CERTIFICATES / "ca.pem"))
    assert peer.texts == ["one"]


def test_a_ca_without_tls_is_refused():
    with pytest.raises(ConfigError, match="ca is for tls: true"):
        TcpSinkConfig(host="a", port=1, ca="ca.pem")
