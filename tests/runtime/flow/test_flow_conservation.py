"""The law: accepted = done + error + cancelled + shed + in_flight; whatever fails, and however tasks interleave."""

from __future__ import annotations

import random

import anyio
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sageLLM.errors import SageLLMError
from sageLLM.records import DeadLetter, Request
from sageLLM.runtime.flow.operator import RestartPolicy

LIMIT_S = 3600  # virtual seconds: a flow that has not ended by then hangs


def build(lab, seed, endless):
    """A source that also reads bad lines; two branches, one of which holds records; a merge; a sink; dead letters."""
    chance = random.Random(seed)
    rates = {name: chance.choice([0, 0, 0.02, 0.2]) for name in ("raise", "reject", "drop", "sink", "source", "ratio")}

    class Source(lab.Source):
        async def run(self, inlet, out):
            while self.options["sent"] < (10**9 if endless else 60):
                if chance.random() < 0.1:
                    await out.reject([DeadLetter("not JSON")])
                size = chance.randrange(1, 9)
                self.options["sent"] += size
                await out.send([Request(f"r{chance.randrange(20)}", prompt="p") for _ in range(size)])
                if chance.random() < rates["source"]:
                    raise OSError("torn pipe")
                await anyio.lowlevel.checkpoint()

    class Split(lab.LabOperator):
        inputs, outputs = lab.Pass.inputs, (*lab.Pass.outputs, lab.Pass.outputs[0].__class__("other"))

        async def process(self, records, out):
            for record in records:
                await out.send([record], chance.choice(["out", "other"]))

    def how(index):
        for choice in ("raise", "reject", "drop"):
            if chance.random() < rates[choice]:
                return choice
        return "out"

    class Faulty(lab.Pass):
        async def process(self, records, out):
            if chance.random() < 0.3:
                await anyio.sleep(0.01)
            await super().process(records, out)

    class Sink(lab.Sink):
        async def process(self, records, out):
            if chance.random() < rates["sink"]:
                raise OSError("no space left")
            await super().process(records, out)

    class FaultyHold(lab.Hold):
        async def _send(self, out):
            if chance.random() < rates["raise"]:
                raise ValueError("sender broke")
            await super()._send(out)

    def small():
        return chance.choice([1, 2, 3, 64])

    def faults():
        on_error = chance.choices(["route", "drop", "fail"], [8, 2, 1])[0]
        restart = RestartPolicy(max_restarts=chance.choice([0, 3, 100]), backoff_s=0.05)
        return {"how": how, "buffer": small(), "on_error": on_error, "restart": restart}

    return lab.flow(
        {
            "source": (Source, {"sent": 0, "restart": RestartPolicy(max_restarts=100)}),
            "split": (Split, {"buffer": small()}),
            "left": (Faulty, faults()),
            "right": (FaultyHold, {**faults(), "keep": chance.randrange(1, 6)}),
            "complete": (lab.Complete, {"buffer": small()}),
            "merge": (Faulty, faults()),
            "sink": (Sink, {"buffer": small(), "restart": RestartPolicy(max_restarts=100)}),
            "copy": (lab.Sink, {"buffer": small()}),
            "dead": (lab.Sink, {"buffer": small()}),
        },
        [
            "source -> split -> left -> merge -> complete -> sink", "split.other -> right -> merge", "complete -> copy",
            "source.error -> dead", "left.error -> dead", "right.error -> dead", "merge.error -> dead",
        ],
        max_error_ratio=0.5 if rates["ratio"] else None,
    )  # fmt: skip


async def run_with_end(lab, seed, end, after):
    flow = build(lab, seed, endless=end is not None)
    told: list[tuple[Request, str]] = []
    flow.ledger.on_settled(told.extend)
    lab.failed = None
    before = trio.lowlevel.current_statistics().tasks_living

    async def end_soon():
        for _ in range(after):
            await anyio.lowlevel.checkpoint()
            flow.ledger.check()
        if end == "cancel":
            tasks.cancel_scope.cancel()
        elif end is not None:
            getattr(flow, end)("the test says so")

    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(end_soon)
            try:
                await flow.run()
            except SageLLMError as error:
                lab.failed = error
    lab.flow_under_test, lab.told = flow, told
    assert trio.lowlevel.current_statistics().tasks_living == before, "a task is left"
    return lab


def check(lab):
    lab.ledger.check()
    counts = lab.ledger.counters()
    assert counts["in_flight"] == 0
    told = [id(request) for request, _ in lab.told]
    assert len(told) == len(set(told)), "a request was told its end twice"
    for name in lab.options:
        assert lab.diary.count(f"{name} open") == lab.diary.count(f"{name} close"), f"{name} was left open"
    ended = [id(record.request) for record in lab.got() if record.request is not None]
    dead = [id(record.request) for record in lab.got("dead") if record.request is not None]
    assert len(ended) == len(set(ended)) and len(dead) == len(set(dead)), "two results for one request"
    assert not set(ended) & set(dead), "a result and a dead letter for one request"
    return counts


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32), interleaving=st.integers(0, 2**32),
    end=st.sampled_from([None, None, "drain", "abort", "cancel"]), after=st.integers(0, 300),
)  # fmt: skip
def test_the_books_balance_whatever_fails(run_seeded, seed, interleaving, end, after):
    async def main(lab):
        return await run_with_end(lab, seed, end, after)

    lab = run_seeded(main, interleaving)
    counts = check(lab)
    if lab.failed is None and end in (None, "drain"):
        assert counts["cancelled"] == counts["shed"] == 0
        # every request that was not filtered out or dropped has one result, or one dead letter
        rejected = sum(stats["dropped"] for stats in lab.flow_under_test.snapshot().values())
        assert counts["done"] <= len(lab.got("copy")) + rejected


@pytest.mark.parametrize("interleaving", range(10))
def test_without_faults_every_interleaving_gives_the_same_records(run_seeded, interleaving):
    async def main(lab):
        flow = lab.flow(
            {"source": (lab.Source, {"count": 60, "size": 5}), "hold": (lab.Hold, {"buffer": 3}),
             "complete": (lab.Complete, {"buffer": 2}), "a": (lab.Sink, {"buffer": 1}), "b": (lab.Sink, {"buffer": 4})},
            ["source -> hold -> complete -> a", "complete -> b"],
        )  # fmt: skip
        await flow.run()
        return lab

    lab = run_seeded(main, interleaving)
    for sink in ("a", "b"):
        assert [record.request_id for record in lab.got(sink)] == [f"r{n}" for n in range(60)]
    assert lab.counts() == {"accepted": 60, "done": 60}
