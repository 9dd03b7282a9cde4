"""A pipeline on the null model that listens, and clients that talk to it, all on one event loop."""

from __future__ import annotations

import json

import anyio
import msgpack
import pytest

import sageLLM.operators  # noqa: F401 - registers the built-in stages
from sageLLM.graph import build_pipeline
from sageLLM.runtime.assembly import assemble
from sageLLM.runtime.services import EngineServices

STAGES = ("tokenize", "kv_lookup", "schedule", "prefill", "kv_commit", "decode", "detokenize")
ENDLESS = 60_000  # tokens: more than any test waits for


class Server:
    """A running pipeline: its source, its books, and how to end it."""

    def __init__(self, folder, source, engine, stages):
        engine = {"model": {"model_id": "builtin:null"}, "kv_cache": {"max_tokens": 400_000}, **engine}
        operators = {"source": source, **{name: {} for name in STAGES}, "reply": {"type": "reply_sink"}}
        operators |= stages
        edges = [" -> ".join(("source", *STAGES, "reply")), "*.error -> reply"]
        self.pipeline = build_pipeline({"operators": operators, "edges": edges, "engine": engine}, base_dir=folder)
        self.services = EngineServices(self.pipeline.engine)
        self.flow = assemble(self.pipeline, self.services)
        self.ended = anyio.Event()
        self.error = None

    @property
    def source(self):
        return self.flow.operators["source"]

    @property
    def counts(self):
        return {name: count for name, count in self.flow.ledger.counters().items() if count}

    async def live(self):
        try:
            async with self.services.running():
                await self.flow.run()
        except Exception as error:
            self.error = error
        self.ended.set()

    async def until(self, condition):
        """Let everything go on until it is so."""
        for _ in range(20_000):
            if condition():
                return
            await anyio.sleep(0.0005)
        raise AssertionError("it never came true")

    async def connect(self, framing="json_lines"):
        source = self.source
        if hasattr(source, "path"):
            return Client(await anyio.connect_unix(source.path), framing)
        host, port = source.address.rpartition("//")[2].split(":")
        return Client(await anyio.connect_tcp(host, int(port)), framing)

    def check_nothing_leaks(self):
        services = self.services
        self.flow.ledger.check()
        assert services.leases.free_slots == services.leases.num_slots
        assert services.worker.num_running == 0
        services.kv.check_integrity(owners=[])
        assert services.kv.available() == services.kv.num_blocks


class Client:
    """One connection: `send` messages, `receive` events, in either framing."""

    def __init__(self, stream, framing):
        self.stream, self.framing = stream, framing
        self.buffer = b""

    async def send(self, *messages):
        for message in messages:
            if self.framing == "msgpack":
                packed = msgpack.packb(message)
                await self.stream.send(len(packed).to_bytes(4, "big") + packed)
            else:
                await self.stream.send(json.dumps(message).encode() + b"\n")

    async def receive(self):
        """The next event, but for keepalives."""
        while True:
            event = await (self._receive_msgpack() if self.framing == "msgpack" else self._receive_line())
            if event["event"] != "keepalive":
                return event

    async def _receive_line(self):
        while b"\n" not in self.buffer:
            self.buffer += await self.stream.receive()
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    async def _receive_msgpack(self):
        size = int.from_bytes(await self._take(4), "big")
        return msgpack.unpackb(await self._take(size))

    async def _take(self, size):
        while len(self.buffer) < size:
            self.buffer += await self.stream.receive()
        taken, self.buffer = self.buffer[:size], self.buffer[size:]
        return taken

    async def receive_until_end(self):
        """All events until the server has ended its side."""
        events = []
        try:
            while True:
                events.append(await self.receive())
        except anyio.EndOfStream:
            assert self.buffer == b""
            return events

    async def ends(self, count):
        """The next so many events that are no deltas, by request id."""
        found = {}
        while len(found) < count:
            event = await self.receive()
            if event["event"] != "delta":
                assert event["request_id"] not in found
                found[event["request_id"]] = event
        return found

    async def close(self):
        await anyio.aclose_forcefully(self.stream)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self.close()


@pytest.fixture
def serve(tmp_path, loop_name):
    """`serve(body, source={...})` runs `await body(server)` beside the pipeline, drains it, and checks its books."""

    def run(body, source=None, engine=None, stages=None, drains=True):
        async def main():
            given = source or {}
            default = {} if "type" in given else {"type": "tcp_source", "port": 0}
            server = Server(tmp_path, {**default, **given}, engine or {}, stages or {})
            with anyio.fail_after(60):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(server.live)
                    await server.until(lambda: server.source.address or server.ended.is_set())
                    if server.error is not None:
                        raise server.error
                    await body(server)
                    if drains:
                        server.flow.drain("the test is over")
                    await server.ended.wait()
            if drains:
                assert server.error is None, server.error
            server.check_nothing_leaks()

        anyio.run(main, backend=loop_name)

    return run


@pytest.fixture
def endless():
    """A request that goes on until somebody ends it."""
    return lambda name, **fields: {"id": name, "prompt": "hi", "max_new_tokens": ENDLESS, "ignore_eos": True, **fields}
