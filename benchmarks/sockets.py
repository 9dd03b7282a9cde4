"""`sagellm bench sockets`: the whole pipeline on the null model, over TCP connections from another process."""

from __future__ import annotations

import json
import random
import socket
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from .overhead import OUTPUT_TOKENS, PROMPT_TOKENS, OverheadReport, build_null_pipeline

if TYPE_CHECKING:
    from ..graph import Pipeline

_CHUNK = 1 << 18


def measure_sockets(requests: int, batch: int, connections: int, stream: bool) -> OverheadReport:
    """Send `requests` of 64 tokens in and 32 out over so many connections, each with its share of `batch` in flight.

    `seconds` is the clients' time, from the first byte sent to the last answer; their process takes CPU time too.

    Raises:
        RuntimeError: a request did not get `done`.
    """
    source = {"type": "tcp_source", "port": 0, "max_in_flight": 2 * batch}
    with tempfile.TemporaryDirectory() as folder:
        pipeline = build_null_pipeline(Path(folder), batch, source, {"type": "reply_sink"})
        seconds = anyio.run(_serve, pipeline, [str(each) for each in (requests, batch, connections, int(stream))])
    return OverheadReport(requests, seconds, None)


async def _serve(pipeline: Pipeline, load: list[str]) -> float:
    from ..runtime.assembly import assemble
    from ..runtime.garbage import collect_rarely
    from ..runtime.services import EngineServices

    services = EngineServices(pipeline.engine)
    flow = assemble(pipeline, services)
    services.load()
    collect_rarely()
    async with services.running(), anyio.create_task_group() as tasks:
        tasks.start_soon(flow.run)
        await flow.running.wait()
        address = flow.operators["source"].address or ""
        command = [sys.executable, "-m", "sageLLM.benchmarks.sockets", address.rpartition(":")[2], *load]
        client = await anyio.run_process(command, stderr=None, check=False)
        flow.drain("the clients are done")
    if client.returncode:
        raise RuntimeError("the clients have failed")
    return float(client.stdout)


def _ask(port: int, lines: list[bytes], window: int) -> None:
    """One client: `window` requests in flight, until each has got `done`."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        sent = done = 0
        tail = b""
        while done < len(lines):
            more = lines[sent : done + window]
            connection.sendall(b"".join(more))
            sent += len(more)
            if not (received := connection.recv(_CHUNK)):
                raise RuntimeError("the server has closed the connection")
            *events, tail = (tail + received).split(b"\n")
            for event in events:
                if event.startswith(b'{"event":"done"'):
                    done += 1
                elif not event.startswith(b'{"event":"delta"'):
                    raise RuntimeError(event.decode())


def _drive(port: int, requests: int, batch: int, connections: int, stream: int) -> float:
    rng = random.Random(0)
    lines = []
    for number in range(requests):
        fields = {"id": number, "prompt_tokens": [rng.randrange(256) for _ in range(PROMPT_TOKENS)]}
        fields |= {"max_new_tokens": OUTPUT_TOKENS, "temperature": 0, "stream": bool(stream)}
        lines.append(json.dumps(fields).encode() + b"\n")
    window = max(1, batch // connections)
    with ThreadPoolExecutor(connections) as threads:
        start = time.perf_counter()
        for client in [threads.submit(_ask, port, lines[n::connections], window) for n in range(connections)]:
            client.result()
        return time.perf_counter() - start


if __name__ == "__main__":
    print(_drive(*map(int, sys.argv[1:])))
