"""Drive one operator by hand: open, run on given lists, close; see what it sent and rejected."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest

from sageLLM.records import Choice, Completion, FinishReason, Request, RequestMetrics, SourcePosition
from sageLLM.runtime.flow.operator import Operator, OperatorContext
from sageLLM.runtime.flow.resume import ResumeIndex

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class CollectingOutlet:
    """Keeps what an operator sends (`sent`), rejects (`letters`) and how it was grouped (`lists`)."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.letters: list[Any] = []
        self.lists: list[int] = []

    async def send(self, records, port="out"):
        await anyio.lowlevel.checkpoint()
        self.sent += records
        self.lists.append(len(records))

    async def reject(self, letters):
        self.letters += letters


@pytest.fixture
def outlet():
    return CollectingOutlet


@pytest.fixture
def make_context(tmp_path):
    """A context without an engine: `make_context(resume=..., drains=[...])`."""

    def make(base_dir: Path = tmp_path, resume: ResumeIndex | None = None, drains: list[str] | None = None):
        ask: Callable[[str], None] = (lambda reason: None) if drains is None else drains.append
        return OperatorContext("node", None, None, base_dir, ask, resume or ResumeIndex())  # type: ignore[arg-type]

    return make


@pytest.fixture(params=["asyncio", "trio"])
def loop_name(request):
    return request.param


@pytest.fixture
def drive(make_context, loop_name):
    """`drive(JsonlSource, {"path": ...}, inputs=[[...], ...])` -> the outlet, after open, run and close."""

    def run(cls: type[Operator[Any]], config: dict[str, Any], inputs=(), context=None, outlet=None) -> CollectingOutlet:
        collected = outlet or CollectingOutlet()

        async def live() -> None:
            node = cls(cls.config_model(**config), context or make_context())

            async def inlet():
                for records in inputs:
                    yield records

            await node.open()
            try:
                await node.run(inlet(), collected)
            finally:
                await node.close()

        anyio.run(live, backend=loop_name)
        return collected

    return run


@pytest.fixture
def make_completion():
    """A completion as detokenize sends it: `make_completion("q1", "four", line=3)`."""

    def make(request_id="q1", text="four", tokens=(4, 5), line=None, file="in.jsonl", fingerprint="f-9", **request):
        src = None if line is None else SourcePosition(file, line, line * 10, fingerprint)
        choice = Choice(0, list(tokens), text, FinishReason.STOP)
        metrics = RequestMetrics(queue_ms=1.0, ttft_ms=20.0, tpot_ms=5.0, e2e_ms=25.0, prefix_hit_tokens=2)
        return Completion(Request(request_id, prompt="2+2", src=src, **request), [choice], 3, metrics)

    return make
