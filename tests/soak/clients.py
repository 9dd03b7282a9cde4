"""Two hundred clients in a process of their own: `python clients.py '{"tcp": 7000, "http": 8000, ...}'`.

Most behave; the others cut, stall, send garbage, send too much, close halfway or connect and leave. They do so in every
other phase and in between ask for as much and read their answers, so that the times to first token of those that behave
are measured under the same load. The last line of output is a JSON object: what they saw in each phase, and what the
rude did.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import sys
import time
from collections import Counter
from contextlib import suppress

TERMINAL = {"done", "error", "cancelled", "shed", "timeout"}
WORDS = ["what", "returns", "the", "length", "of", "a", "list", "which", "names", "how", "many", "are", "in", "it"]


class Stats:
    def __init__(self) -> None:
        self.ttft: dict[str, list[float]] = {"calm": [], "rude": []}
        self.problems: Counter[str] = Counter()
        self.rude: Counter[str] = Counter()
        self.answers = 0


class World:
    """What all clients share: where the servers are, whose phase it is, when it ends."""

    def __init__(self, config: dict) -> None:
        self.tcp, self.http = config["tcp"], config["http"]
        self.stats = Stats()
        self.random = random.Random(config["seed"])
        self.phase = "calm"
        self.over = False

    def think(self) -> float:
        return self.random.expovariate(0.25)

    def request(self, request_id: str, **fields) -> dict:
        words = self.random.choices(WORDS, k=self.random.randint(4, 24))
        return {
            "request_id": request_id,
            "prompt": " ".join(words),
            "max_new_tokens": self.random.randint(1, 12),
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            **fields,
        }


# -- those that behave -------------------------------------------------------------------------------------------------


async def behave_tcp(world: World, name: str) -> None:
    while not world.over:
        reader, writer = await asyncio.open_connection("127.0.0.1", world.tcp)
        for number in range(world.random.randint(1, 20)):
            if world.over:
                break
            await ask_tcp(world, reader, writer, f"{name}-{number}")
            await asyncio.sleep(world.think())
        writer.close()
        await writer.wait_closed()


async def ask_tcp(world: World, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request_id: str) -> None:
    phase, begin, first = world.phase, time.perf_counter(), None
    writer.write(json.dumps(world.request(request_id)).encode() + b"\n")
    while True:
        line = await reader.readline()
        if not line:
            world.stats.problems["tcp: closed by the server"] += 1
            return
        event = json.loads(line)
        if event.get("request_id") != request_id:
            world.stats.problems[f"tcp: {event}"[:200]] += 1
        first = first or time.perf_counter()
        if event["event"] in TERMINAL:
            if event["event"] != "done":
                world.stats.problems[f"tcp: {event['event']}: {event.get('error')}"[:200]] += 1
            break
    if phase == world.phase:
        world.stats.ttft[phase].append(first - begin)
    world.stats.answers += 1


async def behave_http(world: World, name: str) -> None:
    while not world.over:
        reader, writer = await asyncio.open_connection("127.0.0.1", world.http)
        for _ in range(world.random.randint(1, 20)):
            if world.over:
                break
            await ask_http(world, reader, writer)
            await asyncio.sleep(world.think())
        writer.close()
        await writer.wait_closed()


async def ask_http(world: World, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    fields = world.request("")
    body = {"model": world.model, "prompt": fields["prompt"], "max_tokens": fields["max_new_tokens"], "stream": True}
    phase, begin, first = world.phase, time.perf_counter(), None
    writer.write(http_post(json.dumps({**body, "temperature": 0, "ignore_eos": True}).encode()))
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n")[0]:
        world.stats.problems[f"http: {head[:100]!r}"] += 1
        raise ConnectionError
    text = b""
    while True:  # chunked transfer encoding
        size = int((await reader.readline()).split(b";")[0], 16)
        chunk = (await reader.readexactly(size + 2))[:-2]
        if not size:
            break
        if first is None and b'"choices"' in chunk:
            first = time.perf_counter()
        text += chunk
    if b"data: [DONE]" not in text or b'data: {"error"' in text:
        world.stats.problems[f"http: {text[-150:]!r}"] += 1
    if phase == world.phase:
        world.stats.ttft[phase].append((first or time.perf_counter()) - begin)
    world.stats.answers += 1


def http_post(body: bytes, path: str = "/v1/completions") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


# -- those that do not -------------------------------------------------------------------------------------------------


async def cut(world: World, port: int, payload: bytes) -> None:
    """Ask, and reset the connection in the middle of the answer."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(payload)
    await asyncio.sleep(world.random.random() * 0.05)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def stall(world: World, port: int, payload: bytes) -> None:
    """Ask for much, and read nothing."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_connect(sock, ("127.0.0.1", port))
        await asyncio.wait_for(loop.sock_sendall(sock, payload * 4), 5)
        await asyncio.sleep(world.random.uniform(1, 8))
    finally:
        sock.close()


async def garbage(world: World, port: int, payload: bytes) -> None:
    """Bytes that mean nothing, lines among them."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(world.random.randbytes(2000) + b"\n{\n[1, 2]\n" + payload[: len(payload) // 2] + b"\n")
    await drain_briefly(reader)
    writer.close()


async def oversize(world: World, port: int, payload: bytes) -> None:
    """A line, or a body, above every limit."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    reading = asyncio.ensure_future(drain_briefly(reader, 2))
    for _ in range(40):
        if writer.transport.is_closing():
            break
        writer.write(b"x" * 65536)
        await asyncio.wait_for(writer.drain(), 5)
    await reading
    writer.close()


async def close_halfway(world: World, port: int, payload: bytes) -> None:
    """Half a request, then the end of what will be said."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(payload + payload[: len(payload) // 2])
    writer.write_eof()
    await drain_briefly(reader, 3)
    writer.close()


async def storm(world: World, port: int, payload: bytes) -> None:
    """Connect and leave, again and again."""
    for _ in range(world.random.randint(5, 30)):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        await asyncio.sleep(0.005)


async def drip(world: World, port: int, payload: bytes) -> None:
    """A byte now and then."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    for at in range(min(len(payload), 40)):
        if writer.transport.is_closing():
            break
        writer.write(payload[at : at + 1])
        await asyncio.sleep(0.05)
    writer.close()


async def drain_briefly(reader: asyncio.StreamReader, seconds: float = 0.5) -> None:
    try:
        async with asyncio.timeout(seconds):
            while await reader.read(65536):
                pass
    except (TimeoutError, ConnectionError):
        pass


RUDE = [cut, stall, garbage, oversize, close_halfway, storm, drip]


async def take_the_answer(world: World, port: int, payload: bytes) -> None:
    """What a rude one does while it rests from that."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(payload)
    last, text = (b"[DONE]" if port == world.http else b'"event":"done"'), b""
    while last not in text and (data := await reader.read(65536)):
        text += data
    writer.close()


async def misbehave(world: World, number: int) -> None:
    while not world.over:
        way = RUDE[number % len(RUDE)] if world.phase == "rude" else take_the_answer
        line = json.dumps(world.request(f"rude-{number}", max_new_tokens=24)).encode() + b"\n"
        port = world.random.choice([world.tcp, world.http])
        payload = line
        if port == world.http:
            body = {"model": world.model, "prompt": "a", "max_tokens": 24, "stream": True}
            payload = http_post(json.dumps(body).encode())
        with suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
            await way(world, port, payload)
        if way is not take_the_answer:
            world.stats.rude[way.__name__] += 1
        await asyncio.sleep(world.random.uniform(2, 5))


# -- the whole ---------------------------------------------------------------------------------------------------------


async def behave(world: World, number: int) -> None:
    ask = behave_tcp if number % 2 else behave_http
    while not world.over:
        try:
            await ask(world, f"c{number}")
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            if not world.over:
                world.stats.problems[f"{ask.__name__}: {type(error).__name__}: {error}"[:200]] += 1
                await asyncio.sleep(0.5)


async def main(config: dict) -> None:
    world = World(config)
    world.model = config["model"]
    clients, rude = config["clients"], config["clients"] // 3
    begin = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        for number in range(clients - rude):
            tasks.create_task(behave(world, number))
        rude_ones = [tasks.create_task(misbehave(world, number)) for number in range(rude)]
        await asyncio.sleep(config["warmup_s"])
        world.stats.ttft = {"calm": [], "rude": []}
        for turn in range(config["turns"]):
            world.phase = "rude" if turn % 2 else "calm"
            await asyncio.sleep(config["turn_s"])
        world.over = True
        async with asyncio.timeout(60):
            await asyncio.gather(*rude_ones, return_exceptions=True)
    stats = world.stats
    seconds = time.monotonic() - begin
    told = {"ttft": stats.ttft, "problems": stats.problems, "rude": stats.rude, "answers": stats.answers, "s": seconds}
    print(json.dumps(told))


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
