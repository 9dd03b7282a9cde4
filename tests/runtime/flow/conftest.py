"""A small flow to experiment with: `lab.flow(operators, edges)` and operators that misbehave in every way."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
import trio
from trio.testing import MockClock

from sageLLM.graph.pipeline import Edge
from sageLLM.records import Choice, Completion, DeadLetter, FinishReason, Request
from sageLLM.runtime.flow.flow import Flow
from sageLLM.runtime.flow.ledger import Ledger
from sageLLM.runtime.flow.operator import (
    ERROR_PORT,
    Operator,
    OperatorConfig,
    OperatorContext,
    Port,
    RestartPolicy,
)


def complete(request: Request, reason: FinishReason = FinishReason.STOP) -> Completion:
    return Completion(request, [Choice(0, [1], "x", reason)], 1)


class LabOperator(Operator[OperatorConfig]):
    """Keeps a diary; `options` are what a test gives it."""

    def __init__(self, config, context, diary, options):
        super().__init__(config, context)
        self.diary = diary
        self.options = options
        for name, value in options.items():
            setattr(self, name, value)

    def note(self, what: str) -> None:
        self.diary.append(f"{self.context.name} {what}")

    async def open(self):
        self.note("open")

    async def close(self):
        self.note("close")


class Source(LabOperator):
    """Sends `count` requests (None: for ever), in lists of `size`."""

    outputs = (Port("out"), ERROR_PORT)
    count: int | None = 10
    size = 4

    async def run(self, inlet, out):
        self.note("run")
        sent = 0
        while self.count is None or sent < self.count:
            size = self.size if self.count is None else min(self.size, self.count - sent)
            await out.send([Request(f"r{sent + i}", prompt="p") for i in range(size)])
            sent += size
            await anyio.lowlevel.checkpoint()


class Pass(LabOperator):
    """Sends on what comes, as `how` (a function of the record's number) says: out, reject, drop, or an exception."""

    inputs = (Port("in"),)
    outputs = (Port("out", same_as="in"), ERROR_PORT)
    how = staticmethod(lambda index: "out")
    seen = 0

    async def process(self, records, out):
        for record in records:
            # the count belongs to the place, not to the instance: a new instance goes on counting
            self.options["index"] = index = self.options.get("index", -1) + 1
            choice = self.how(index)
            if choice == "raise":
                raise ValueError(f"record {index}")
            if choice == "reject":
                request = record if isinstance(record, Request) else record.request
                await out.reject([DeadLetter(f"bad {index}", request=request)])
            elif choice == "drop":
                out.drop([record])
            else:
                await out.send([record])


class Complete(LabOperator):
    """Makes completions of requests."""

    inputs = (Port("in"),)
    outputs = (Port("out"), ERROR_PORT)
    reason = FinishReason.STOP

    async def process(self, records, out):
        await out.send([complete(record, self.reason) if isinstance(record, Request) else record for record in records])


class Hold(LabOperator):
    """Reads and sends in two tasks, as the worker's doors do, and keeps up to `keep` records."""

    inputs = (Port("in"),)
    outputs = (Port("out", same_as="in"), ERROR_PORT)
    keep = 5

    async def run(self, inlet, out):
        self.held: list[Any] = []
        self.ended = False
        self.changed = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._send, out)
            async for records in inlet:
                self.held += records
                while len(self.held) > self.keep:
                    await self._change()
                self._tell()
            self.ended = True
            self._tell()

    async def _send(self, out):
        while self.held or not self.ended:
            if not self.held:
                await self._change()
                continue
            batch, self.held[:] = self.held[:2], self.held[2:]
            await out.send(batch)
            self._tell()

    def _tell(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()

    async def _change(self) -> None:
        self._tell()
        await self.changed.wait()


class Sink(LabOperator):
    """Keeps what it gets."""

    inputs = (Port("in"),)
    fail_at: int | None = None

    async def process(self, records, out):
        got = self.options.setdefault("got", [])
        for record in records:
            if len(got) == self.fail_at:
                self.options["fail_at"] = None
                raise OSError("no space left")
            got.append(record)


def parse(edges: list[str]) -> list[Edge]:
    found = []
    for chain in edges:
        names = [end.strip() for end in chain.split("->")]
        for source, target in pairwise(names):
            node, _, port = source.partition(".")
            found.append(Edge(node, port or "out", target.partition(".")[0], "in"))
    return found


class Lab(SimpleNamespace):
    """`flow({"a": (Source, {...}), ...}, ["a -> b -> c"])`; options named like config fields go to the config."""

    def flow(self, operators, edges, **flow_options) -> Flow:
        self.diary: list[str] = []
        self.ledger = Ledger()
        factories = {}
        self.options = {}
        for name, entry in operators.items():
            cls, options = entry if isinstance(entry, tuple) else (entry, {})
            fields = {key: options.pop(key) for key in ("buffer", "on_error", "restart") if key in options}
            fields.setdefault("restart", RestartPolicy(max_restarts=3, window_s=60.0, backoff_s=0.001))
            self.options[name] = options
            factories[name] = self._factory(name, cls, OperatorConfig(**fields), options)
        return Flow(factories, parse(edges), self.ledger, **flow_options)

    def _factory(self, name, cls, config, options):
        context = OperatorContext(name, None, self.ledger, Path(), lambda reason: None)  # type: ignore[arg-type]
        return lambda: cls(config, context, self.diary, options)

    def got(self, name: str = "sink") -> list[Any]:
        return self.options[name].get("got", [])

    def counts(self) -> dict[str, int]:
        self.ledger.check()
        return {name: count for name, count in self.ledger.counters().items() if count}


@pytest.fixture
def lab():
    return make_lab()


def make_lab() -> Lab:
    return Lab(
        Source=Source, Pass=Pass, Complete=Complete, Hold=Hold, Sink=Sink, LabOperator=LabOperator, complete=complete
    )


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request):
    """asyncio in real time, trio in virtual time."""
    if request.param == "trio":
        return "trio", {"clock": MockClock(autojump_threshold=0)}
    return request.param


@pytest.fixture
def run_seeded(monkeypatch):
    """`run_seeded(function, seed)` runs `function(lab)` under trio, in virtual time and an interleaving of its own."""

    def run(function, seed):
        fresh = make_lab()
        with monkeypatch.context() as patch:
            patch.setattr(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
            patch.setattr(trio._core._run, "_r", random.Random(seed))
            return anyio.run(
                function, fresh, backend="trio", backend_options={"clock": MockClock(autojump_threshold=0)}
            )

    return run
