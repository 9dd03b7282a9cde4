"""`sagellm bench http`: what the HTTP API costs, against an application that only streams the same chunks.

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
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from .measurement import format_table

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

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
    """What came of a load. `cpu_us` is the server's CPU time for a request; `pipeline_ms` the median TTFT that the
    pipeline itself has measured, from a request's arrival to its first token (None: there is no pipeline)."""

    requests: int
    seconds: float
    ttft_ms: list[float]
    cpu_us: float
    pipeline_ms: float | None

    @property
    def requests_per_second(self) -> float:
        return self.requests / self.seconds

    @property
    def median_ttft_ms(self) -> float:
        return statistics.median(self.ttft_ms)


def measure_http(seconds: float, connections: int) -> str:
    """Load the server and the bare application one after the other, alone and with many connections; a table."""
    rows = []
    added = 0.0
    for name, target in (("sagellm", _serve_pipeline), ("bare uvicorn", _serve_bare)):
        for count in (1, connections):
            with _server(target) as (port, ask):
                _load(port, count, min(1.0, seconds), ask)  # warm
                load = _load(port, count, seconds, ask)
            pipeline = "" if load.pipeline_ms is None else f"{load.pipeline_ms:.2f}"
            if count == 1 and load.pipeline_ms is not None:
                added = load.median_ttft_ms - load.pipeline_ms
            rows.append([
                name, f"{count}", f"{load.requests_per_second:.0f}", f"{load.median_ttft_ms:.2f}", pipeline,
                f"{load.cpu_us:.0f}",
            ])  # fmt: skip
    header = ["server", "connections", "requests/s", "TTFT ms", "of it pipeline", "server CPU us/request"]
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


def _load(port: int, connections: int, seconds: float, ask: Any) -> Load:
    """Each connection sends a request, reads its answer, and sends the next, for so many seconds."""
    body = json.dumps(_BODY).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    request = b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body)
    selector = selectors.DefaultSelector()
    clients = [_Client(port, request) for _ in range(connections)]
    cpu, _ = ask()
    begun = time.perf_counter()
    for client in clients:
        selector.register(client.socket, selectors.EVENT_READ, client)
        client.send()
    ttft, running = [], connections
    while running:
        for key, _ in selector.select():
            client = key.data
            if client.read():
                ttft.append(client.ttft * 1000)
                if time.perf_counter() - begun < seconds:
                    client.send()
                else:
                    running -= 1
    taken = time.perf_counter() - begun
    cpu_after, pipeline_ms = ask()
    for client in clients:
        client.socket.close()
    selector.close()
    return Load(len(ttft), taken, ttft, (cpu_after - cpu) / len(ttft) * 1e6, pipeline_ms)


# -- the servers -------------------------------------------------------------------------------------------------------


@contextmanager
def _server(target: Any) -> Iterator[tuple[int, Any]]:
    """A server process: its port, and a function that tells its CPU seconds and its pipeline's median TTFT in ms."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run_server, args=(target, theirs), daemon=True)
    process.start()
    theirs.close()

    def ask() -> tuple[float, float | None]:
        ours.send("how is it")
        answer: tuple[float, float | None] = ours.recv()
        return answer

    try:
        yield ours.recv(), ask
    finally:
        ours.close()
        process.join()


def _run_server(target: Any, pipe: Connection) -> None:
    anyio.run(target, pipe)


async def _answer(pipe: Connection, port: int, ttft: Any) -> None:
    """Tell the port, then how it is as often as asked, until nobody listens any more."""
    pipe.send(port)
    while True:
        await anyio.wait_readable(pipe)
        try:
            pipe.recv()
        except EOFError:
            return
        pipe.send((time.process_time(), ttft()))


async def _serve_pipeline(pipe: Connection) -> None:
    from .. import operators  # noqa: F401 - registers the built-in stages
    from ..graph import load_pipeline
    from ..operators.metrics import Metrics
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
            source, metrics = flow.operators["source"], flow.operators["metrics"]
            assert source.address is not None
            assert isinstance(metrics, Metrics)
            port = int(source.address.rpartition(":")[2])
            await _answer(pipe, port, lambda: metrics.summary().ttft_ms.p50)
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
    await _answer(pipe, listening.getsockname()[1], lambda: None)
    for each in server.servers:
        each.close()
