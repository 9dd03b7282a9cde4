"""Two hundred connections, a third of which misbehave: afterwards everything is as it was, and nobody else noticed.

Two minutes in CI. `pytest tests/soak --soak-minutes 30` for the long one; its result is in docs/sockets.md.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from pathlib import Path

import anyio
import numpy as np
import pytest

import sageLLM.operators  # noqa: F401 - registers the stages
from sageLLM.graph import build_pipeline
from sageLLM.runtime.assembly import assemble
from sageLLM.runtime.garbage import collect_rarely
from sageLLM.runtime.services import EngineServices

CLIENTS = 200
WARMUP_S, TURN_S = 10, 11
FLAT_MB, FLAT_MB_PER_TURN = 8, 0.05  # resident memory may grow by so much in the second half: the first fills the books
SETTLE_S = 30
STAGES = "tokenize -> kv_lookup -> schedule -> prefill -> kv_commit -> decode -> detokenize -> metrics -> reply"


@pytest.fixture
def turns(request):
    """Calm and rude ones in alternation, at least two of each."""
    seconds = 60 * request.config.getoption("--soak-minutes") - WARMUP_S
    return max(4, 2 * round(seconds / TURN_S / 2))


def pipeline(ports):
    return {
        "name": "soak",
        "engine": {"model": {"model_id": "builtin:pydoc-tiny"}, "kv_cache": {"max_tokens": 16384}},
        "operators": {
            "tcp": {"type": "tcp_source", "port": ports[0], "max_message_bytes": 65536, "write_timeout_s": 2},
            "http": {"type": "http_source", "port": ports[1], "max_body_bytes": 65536, "write_timeout_s": 2,
                     "read_timeout_s": 3},
            "reply": {"type": "reply_sink"},
        }
        | {stage: {} for stage in STAGES.split(" -> ")[:-1]},
        "edges": [f"tcp -> {STAGES}", "http -> tokenize", "*.error -> reply"],
    }  # fmt: skip


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


class Soak:
    """The servers, in this process; the clients are in another."""

    def __init__(self, turns: int) -> None:
        self.turns = turns
        self.ports = free_ports(2)
        built = build_pipeline(pipeline(self.ports), base_dir=Path.cwd())
        self.services = EngineServices(built.engine)
        self.flow = assemble(built, self.services)
        self.told: dict = {}
        self.memory: list[float] = []

    async def run(self) -> None:
        async with self.flow.claimed():
            self.services.load()
            collect_rarely()  # as our programs do
            async with self.services.running(), anyio.create_task_group() as tasks:
                tasks.start_soon(self.flow.run)
                await anyio.sleep(1)
                before = self.tasks()
                tasks.start_soon(self.watch_memory)
                await self.run_clients()
                with anyio.fail_after(SETTLE_S):
                    # the watch is one task more; noqa: nobody tells of tasks that end
                    while self.flow.ledger.counters()["in_flight"] or self.tasks() > before + 1:  # noqa: ASYNC110
                        await anyio.sleep(0.1)
                self.check_nothing_leaks()
                tasks.cancel_scope.cancel()

    async def run_clients(self) -> None:
        config = {"tcp": self.ports[0], "http": self.ports[1], "model": "builtin:pydoc-tiny", "clients": CLIENTS,
                  "seed": 1, "warmup_s": WARMUP_S, "turn_s": TURN_S, "turns": self.turns}  # fmt: skip
        script = Path(__file__).with_name("clients.py")
        done = await anyio.run_process([sys.executable, str(script), json.dumps(config)], stderr=None)
        self.told = json.loads(done.stdout)

    async def watch_memory(self) -> None:
        await anyio.sleep(WARMUP_S)
        while True:
            await anyio.sleep(TURN_S)
            self.memory.append(resident_mb())

    @staticmethod
    def tasks() -> int:
        return len(asyncio.all_tasks())

    def check_nothing_leaks(self) -> None:
        services = self.services
        self.flow.ledger.check()
        assert services.leases.free_slots == services.leases.num_slots
        assert not services.leases.any_in_transit
        assert services.worker.num_running == 0
        services.kv.check_integrity(owners=[])
        assert services.kv.available() == services.kv.num_blocks


@pytest.mark.timeout(0)
def test_a_third_of_the_clients_misbehaves_and_nobody_else_notices(turns):
    soak = Soak(turns)
    anyio.run(soak.run)
    told, counters = soak.told, soak.flow.ledger.counters()
    calm, rude = (np.quantile(told["ttft"][phase], 0.99) for phase in ("calm", "rude"))
    print(f"\n{told['answers']} answers in {told['s']:.0f} s; requests {counters}")
    print(f"rude {told['rude']}; p99 TTFT {1e3 * calm:.1f} ms calm, {1e3 * rude:.1f} ms rude: {rude / calm:.2f}x")
    print(f"resident MB at the end of each turn: {[round(mb, 1) for mb in soak.memory]}")
    assert told["problems"] == {}
    assert sum(told["rude"].values()) > len(told["rude"]) == 7
    assert rude < 2 * calm
    assert soak.memory[-1] - soak.memory[len(soak.memory) // 2] < FLAT_MB + FLAT_MB_PER_TURN * turns
