"""`sagellm bench http`: what the HTTP API costs, against the same pipeline called in its own process, and against an
application that only streams the same chunks.

The server is a process of its own; the load comes from here, by plain sockets that parse no more than they must.
"""

from __future__ import annotations

import json
import selectors
import socket
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel

from ..operators.sources.request_format import ChatBody, parse_json, request_from_body
from ..runtime.calls import Caller
from .measurement import format_table

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

    from ..operators.sources.net.intake import Intake
    from ..records import Completion, DeadLetter, TokenDelta
    from ..runtime.flow.ledger import Outcome

OUTPUT_TOKENS = 16
_BODY = {
    "model": "builtin:null",
    "messages": [{"role": "user", "content": "What does heapq.heappush do? Answer in one sentence."}],
    "max_tokens": OUTPUT_TOKENS,
    "stream": True,
}
_PIPELINE = Path(__file__).parent.parent / "pipelines" / "serve.yaml"
_LAST = b"\r\n0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Load:
    """What came of a load; `cpu_seconds` are the server's."""

    ttft_ms: list[float]
    seconds: float
    cpu_seconds: float

    @property
    def median_ttft_ms(self) -> float:
        return statistics.median(self.ttft_ms)

    def row(self, name: str, connections: int) -> list[str]:
        count = len(self.ttft_ms)
        cells = [f"{count / self.seconds:.0f}", f"{self.median_ttft_ms:.2f}", f"{self.cpu_seconds / count * 1e6:.0f}"]
        return [name, f"{connections}", *cells]


def measure_http(seconds: float, connections: int) -> str:
    """Load each with one request at a time and with many, after a warm-up; a table, and what HTTP adds to the TTFT."""
    rows, alone = [], {}
    for name, target, send in (
        ("in process", _serve_pipeline, _load_inside),
        ("http", _serve_pipeline, _load),
        ("bare uvicorn", _serve_bare, _load),
    ):
        with _server(target) as server:
            for count in (1, connections):
                send(server, count, min(1.0, seconds))
                load = send(server, count, seconds)
                rows.append(load.row(name, count))
                if count == 1:
                    alone[name] = load.median_ttft_ms
    header = ["", "at once", "requests/s", "TTFT ms", "server CPU us/request"]
    added = alone["http"] - alone["in process"]
    told = f"HTTP adds {added:.2f} ms to the TTFT of a request that is alone ({OUTPUT_TOKENS} tokens, null model)"
    return f"{format_table(header, rows)}\n{told}"


# -- the load ----------------------------------------------------------------------------------------------------------


class _Client:
    """One connection, one request at a time."""

    def __init__(self, port: int, request: bytes) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._request = request
        self._tail = b""

    def send(self) -> None:
        self.begun = time.perf_counter()
        self.ttft: float | None = None
        self._tail = b""
        self.socket.sendall(self._request)

    def read(self) -> bool:
        """Whether the answer is complete.

        Raises:
            ConnectionError: it is no stream, or it was cut.
        """
        data = self.socket.recv(262_144)
        if not data:
            raise ConnectionError("the server closed the connection")
        if self.ttft is None:
            if not self._tail and not data.startswith(b"HTTP/1.1 200"):
                raise ConnectionError(f"the server answered {data[:500]!r}")
            if b"data: " in data:
                self.ttft = time.perf_counter() - self.begun
        self._tail = (self._tail + data)[-len(_LAST) :]
        return self._tail == _LAST


def _load(server: _Server, connections: int, seconds: float) -> Load:
    """Each connection sends a request, reads its answer, and sends the next, for so many seconds."""
    body = json.dumps(_BODY).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    request = b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body)
    selector = selectors.DefaultSelector()
    clients = [_Client(server.port, request) for _ in range(connections)]
    cpu, begun = server.ask(), time.perf_counter()
    for client in clients:
        selector.register(client.socket, selectors.EVENT_READ, client)
        client.send()
    ttft_ms, running = [], connections
    while running:
        for key, _ in selector.select():
            client = key.data
            if client.read():
                ttft_ms.append(client.ttft * 1000)
                if time.perf_counter() - begun < seconds:
                    client.send()
                else:
                    running -= 1
    load = Load(ttft_ms, time.perf_counter() - begun, server.ask() - cpu)
    for client in clients:
        client.socket.close()
    selector.close()
    return load


def _load_inside(server: _Server, connections: int, seconds: float) -> Load:
    """The same requests, submitted by the server's own process."""
    answer: Load = server.ask((connections, seconds))
    return answer


# -- the servers -------------------------------------------------------------------------------------------------------


class _Server:
    """A server process: its port, and its CPU seconds so far, or a load that it is to make itself."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self.port: int = pipe.recv()

    def ask(self, load: tuple[int, float] | None = None) -> Any:
        self._pipe.send(load)
        return self._pipe.recv()


@contextmanager
def _server(target: Any) -> Iterator[_Server]:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run_server, args=(target, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield _Server(ours)
    finally:
        ours.close()
        process.join()


def _run_server(target: Any, pipe: Connection) -> None:
    anyio.run(target, pipe)


async def _answer(pipe: Connection, port: int, make_load: Any = None) -> None:
    """Tell the port, then what is asked, until nobody listens any more."""
    pipe.send(port)
    while True:
        await anyio.wait_readable(pipe)
        try:
            load = pipe.recv()
        except EOFError:
            return
        pipe.send(time.process_time() if load is None else await make_load(*load))


class _Timed(Caller):
    """Notes the time of its first token, and waits for its end."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.ttft_ms: float | None = None
        self.told = anyio.Event()

    def receive_delta(self, delta: TokenDelta) -> None:
        if self.ttft_ms is None:
            self.ttft_ms = (time.perf_counter() - self.begun) * 1000

    def receive_end(self, record: Completion | DeadLetter | None, outcome: Outcome) -> None:
        if self.ttft_ms is None:
            raise RuntimeError(f"a request ended with {outcome} and without a token")
        self.told.set()


async def _submit_inside(intake: Intake, connections: int, seconds: float) -> Load:
    ttft_ms: list[float] = []
    cpu, begun = time.process_time(), time.perf_counter()

    async def go_on() -> None:
        while time.perf_counter() - begun < seconds:
            caller = _Timed()
            intake.submit(request_from_body(parse_json(ChatBody, json.dumps(_BODY).encode()), "r"), caller)
            await caller.told.wait()
            assert caller.ttft_ms is not None
            ttft_ms.append(caller.ttft_ms)

    async with anyio.create_task_group() as tasks:
        for _ in range(connections):
            tasks.start_soon(go_on)
    return Load(ttft_ms, time.perf_counter() - begun, time.process_time() - cpu)


async def _serve_pipeline(pipe: Connection) -> None:
    from .. import operators  # noqa: F401 - registers the built-in stages
    from ..graph import load_pipeline
    from ..operators.sources.http_source import HttpSource
    from ..runtime.assembly import assemble
    from ..runtime.garbage import collect_rarely
    from ..runtime.services import EngineServices

    settings = ["model=builtin:null", "port=0", "engine.scheduler.max_batch_size=512"]
    settings += [f"engine.scheduler.{name}=512" for name in ("max_prefill_batch", "max_decode_batch")]
    settings += ["engine.scheduler.max_step_tokens=65536", "engine.kv_cache.max_tokens=262144"]
    pipeline = load_pipeline(_PIPELINE, settings)
    services = EngineServices(pipeline.engine)
    flow = assemble(pipeline, services)
    async with flow.claimed(), anyio.create_task_group() as tasks:
        services.load()
        collect_rarely()
        async with services.running():
            tasks.start_soon(flow.run)
            await flow.running.wait()
            source = flow.operators["source"]
            assert isinstance(source, HttpSource)
            assert source.address is not None
            while source.intake is None:
                await anyio.lowlevel.checkpoint()
            port = int(source.address.rpartition(":")[2])
            await _answer(pipe, port, partial(_submit_inside, source.intake))
            tasks.cancel_scope.cancel()


async def _serve_bare(pipe: Connection) -> None:
    """The same status, headers and events, each in a write of its own, and nothing else."""
    import uvicorn

    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-request-id", b"x" * 41)]
    event = (
        b'data: {"id":"chatcmpl-%b","object":"chat.completion.chunk","created":1795887946,"model":"builtin:null",'
        b'"choices":[{"index":0,"delta":{"content":"a"},"logprobs":null,"finish_reason":null}]}\n\n' % (b"x" * 32)
    )

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(OUTPUT_TOKENS):
            await send({"type": "http.response.body", "body": event, "more_body": True})
            await anyio.lowlevel.checkpoint()
        await send({"type": "http.response.body", "body": event + b"data: [DONE]\n\n"})

    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # as uvicorn makes its own
    listening.bind(("127.0.0.1", 0))
    listening.listen(1024)
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none")
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup([listening])
    await _answer(pipe, listening.getsockname()[1])
    for each in server.servers:
        each.close()
