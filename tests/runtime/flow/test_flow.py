"""A flow moves records from sources to sinks, and says how many went where."""

from __future__ import annotations

from contextlib import suppress

import anyio
import pytest

from sageLLM.errors import ConfigError, FlowError
from sageLLM.graph.operator_spec import RecordKind
from sageLLM.graph.pipeline import Edge
from sageLLM.records import DeadLetter, FinishReason, Request, Sequence
from sageLLM.runtime.flow.flow import Flow

pytestmark = pytest.mark.anyio


async def test_records_flow_in_order_through_small_buffers(lab):
    flow = lab.flow(
        {"source": (lab.Source, {"count": 100, "size": 7}), "pass": (lab.Pass, {"buffer": 3}),
         "complete": (lab.Complete, {"buffer": 1}), "sink": (lab.Sink, {"buffer": 2})},
        ["source -> pass -> complete -> sink"],
    )  # fmt: skip
    report = await flow.run()
    assert [record.request_id for record in lab.got()] == [f"r{n}" for n in range(100)]
    assert lab.counts() == {"accepted": 100, "done": 100}
    assert report.counters["done"] == 100
    counts = {"taken": 100, "sent": 100, "rejected": 0, "dropped": 0, "restarts": 0, "lost": 0}
    assert report.operators["pass"] == counts
    assert report.drained is None


async def test_all_open_before_any_runs_sinks_first_and_all_close(lab):
    flow = lab.flow(
        {"source": lab.Source, "pass": lab.Pass, "sink": lab.Sink}, ["source -> pass -> sink", "pass.error -> sink"]
    )
    await flow.run()
    assert lab.diary[:4] == ["sink open", "pass open", "source open", "source run"]
    assert sorted(lab.diary[4:]) == ["pass close", "sink close", "source close"]


async def test_an_operator_lives_in_a_task_of_its_own(lab):
    tasks = []

    class Tracked(lab.Pass):
        async def open(self):
            tasks.append(anyio.get_current_task().id)

        async def process(self, records, out):
            tasks.append(anyio.get_current_task().id)
            await out.send(records)

        async def close(self):
            tasks.append(anyio.get_current_task().id)

    flow = lab.flow({"source": lab.Source, "tracked": Tracked, "sink": lab.Sink}, ["source -> tracked -> sink"])
    await flow.run()
    assert len(set(tasks)) == 1 and anyio.get_current_task().id not in tasks


async def test_branches_and_a_merge(lab):
    class Odd(lab.LabOperator):
        inputs, outputs = lab.Pass.inputs, (*lab.Pass.outputs, lab.Pass.outputs[0].__class__("odd"))

        async def process(self, records, out):
            for record in records:
                await out.send([record], "odd" if int(record.request_id[1:]) % 2 else "out")

    flow = lab.flow(
        {"source": (lab.Source, {"count": 50}), "split": Odd, "left": (lab.Complete, {"buffer": 2}),
         "right": (lab.Hold, {"buffer": 1}), "merge": (lab.Pass, {"buffer": 1}), "sink": lab.Sink},
        ["source -> split -> left -> merge -> sink", "split.odd -> right -> merge"],
    )  # fmt: skip
    await flow.run()
    ids = [record.request_id for record in lab.got()]
    assert sorted(ids) == sorted(f"r{n}" for n in range(50))
    for parity in (0, 1):  # the order within each branch is kept
        branch = [number for number in (int(name[1:]) for name in ids) if number % 2 == parity]
        assert branch == sorted(branch)
    assert lab.counts() == {"accepted": 50, "done": 50}


async def test_a_port_with_two_edges_copies_and_a_request_ends_with_its_last_copy(lab):
    class Loud(lab.Complete):
        async def process(self, records, out):
            for record in records:
                record.choices[0].text = record.choices[0].text.upper()
            await out.send(records)

    flow = lab.flow(
        {"source": lab.Source, "complete": lab.Complete, "loud": Loud, "a": lab.Sink, "b": (lab.Sink, {"buffer": 1})},
        ["source -> complete -> loud -> a", "complete -> b"],
    )
    settled = []
    flow.ledger.on_settled(settled.extend)
    await flow.run()
    assert {record.choices[0].text for record in lab.got("a")} == {"X"}
    assert {record.choices[0].text for record in lab.got("b")} == {"x"}, "the branches share what they write to"
    assert lab.counts() == {"accepted": 10, "done": 10}
    assert len(settled) == 10


async def test_copied_requests_count_once_and_the_worst_outcome_wins(lab):
    flow = lab.flow(
        {"source": (lab.Source, {"count": 6}), "good": lab.Complete,
         "bad": (lab.Pass, {"how": lambda index: "reject" if index % 2 else "out"}), "sink": lab.Sink},
        ["source -> good -> sink", "source -> bad -> sink", "bad.error -> sink"],
    )  # fmt: skip
    await flow.run()
    assert len(lab.got()) == 12
    assert lab.counts() == {"accepted": 6, "done": 3, "error": 3}


async def test_a_completion_ends_its_request_only_with_its_slowest_copy(lab):
    async def slow(records, out):
        before.append(lab.counts()["in_flight"])
        await out.reject([DeadLetter("too late", request=record.request) for record in records])

    before = []
    flow = lab.flow(
        {"source": lab.Source, "complete": lab.Complete, "slow": lab.Pass, "sink": lab.Sink},
        ["source -> complete -> sink", "complete -> slow -> sink", "slow.error -> sink"],
    )
    flow.operators["slow"].process = slow
    await flow.run()
    assert before[0] > 0
    assert lab.counts() == {"accepted": 10, "error": 10}


async def test_sequences_own_kv_blocks_and_are_not_copied(lab):
    def edge(target):
        return Edge("pass", "out", target, "in", frozenset({RecordKind.SEQUENCE}))

    lab.flow({"pass": lab.Pass, "a": lab.Sink, "b": lab.Sink}, [])
    factories = {name: lab._factory(name, lab.Pass, lab.Pass.config_model(), {}) for name in ("pass", "a", "b")}
    with pytest.raises(ConfigError, match=r"pass\.out gives sequences, which cannot be copied"):
        Flow(factories, [edge("a"), edge("b")], lab.ledger)


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [(FinishReason.LENGTH, "done"), (FinishReason.CANCELLED, "cancelled"), (FinishReason.TIMEOUT, "shed"),
     (FinishReason.QUEUE_TIMEOUT, "shed"), (FinishReason.FIRST_TOKEN_TIMEOUT, "shed"), (FinishReason.ERROR, "error")],
)  # fmt: skip
async def test_how_a_completion_ends_its_request(lab, reason, outcome):
    flow = lab.flow(
        {"source": lab.Source, "complete": (lab.Complete, {"reason": reason}), "sink": lab.Sink},
        ["source -> complete -> sink"],
    )
    await flow.run()
    assert lab.counts() == {"accepted": 10, outcome: 10}


async def test_bad_records_take_the_error_port(lab):
    flow = lab.flow(
        {"source": lab.Source, "pass": (lab.Pass, {"how": lambda index: "reject" if index < 3 else "out"}),
         "sink": lab.Sink, "dead": lab.Sink},
        ["source -> pass -> sink", "pass.error -> dead"],
    )  # fmt: skip
    await flow.run()
    assert [letter.error for letter in lab.got("dead")] == ["bad 0", "bad 1", "bad 2"]
    assert lab.counts() == {"accepted": 10, "done": 7, "error": 3}


async def test_on_error_drop_counts_and_forgets(lab):
    flow = lab.flow(
        {"source": lab.Source, "pass": (lab.Pass, {"how": lambda index: "reject", "on_error": "drop"}),
         "sink": lab.Sink},
        ["source -> pass -> sink"],
    )  # fmt: skip
    await flow.run()
    assert lab.counts() == {"accepted": 10, "error": 10}


async def test_on_error_fail_stops_the_run_even_if_the_operator_swallows_the_error(lab):
    class Stubborn(lab.Pass):
        async def process(self, records, out):
            with suppress(FlowError):
                await super().process(records, out)

    flow = lab.flow(
        {"source": (lab.Source, {"count": None}),
         "pass": (Stubborn, {"how": lambda index: "reject", "on_error": "fail"}), "sink": lab.Sink},
        ["source -> pass -> sink"],
    )  # fmt: skip
    with pytest.raises(FlowError, match=r"operator 'pass': bad 0 \(on_error: fail\)"):
        await flow.run()
    assert lab.counts().keys() == {"accepted", "error"}


async def test_lines_that_are_no_requests_are_accepted_and_failed(lab):
    class Lines(lab.Source):
        async def run(self, inlet, out):
            await out.reject([DeadLetter("not JSON", raw="{")] * 3)
            await super().run(inlet, out)

    flow = lab.flow(
        {"source": Lines, "complete": lab.Complete, "sink": lab.Sink},
        ["source -> complete -> sink", "source.error -> sink"],
    )
    await flow.run()
    assert lab.counts() == {"accepted": 13, "done": 10, "error": 3}
    assert len(lab.got()) == 13


async def test_dropped_records_are_done_and_filtered(lab):
    flow = lab.flow(
        {"source": lab.Source, "pass": (lab.Pass, {"how": lambda index: "drop" if index < 4 else "out"}),
         "sink": lab.Sink},
        ["source -> pass -> sink"],
    )  # fmt: skip
    await flow.run()
    assert lab.counts() == {"accepted": 10, "done": 10, "filtered": 4}
    assert flow.snapshot()["pass"]["dropped"] == 4


async def test_records_left_unaccounted_for_fail_the_run_at_its_end(lab):
    class Careless(lab.Pass):
        async def process(self, records, out):
            await out.send(records[1:])

    flow = lab.flow({"source": lab.Source, "careless": Careless, "sink": lab.Sink}, ["source -> careless -> sink"])
    with pytest.raises(FlowError, match=r"'careless' took \d records that it neither sent nor rejected: call out.drop"):
        await flow.run()
    counts = lab.counts()
    assert counts["done"] == len(lab.got()) and counts["done"] + counts["error"] == counts["accepted"] == 10


async def test_what_arrives_after_an_operator_has_ended_is_shed_and_nothing_hangs(lab):
    class First(lab.Pass):
        async def run(self, inlet, out):
            async for records in inlet:
                await out.send(records)
                return

    flow = lab.flow(
        {"source": (lab.Source, {"count": 100}), "first": (First, {"buffer": 4}), "sink": lab.Sink},
        ["source -> first -> sink"],
    )
    await flow.run()
    assert lab.counts() == {"accepted": 100, "done": 4, "shed": 96}


async def test_the_same_request_id_twice_is_two_requests(lab):
    class Twins(lab.Source):
        async def run(self, inlet, out):
            await out.send([Request("same", prompt="p"), Request("same", prompt="p")])

    flow = lab.flow({"source": Twins, "sink": lab.Sink}, ["source -> sink"])
    await flow.run()
    assert lab.counts() == {"accepted": 2, "done": 2}


async def test_an_operator_may_add_requests_and_records_of_a_request(lab):
    class Split(lab.Complete):
        async def process(self, records, out):
            await out.send([lab.complete(record) for record in records for _ in range(3)])
            await out.send([Request("more", prompt="p")])

    flow = lab.flow(
        {"source": (lab.Source, {"count": 4}), "split": Split, "sink": lab.Sink}, ["source -> split -> sink"]
    )
    await flow.run()
    assert len(lab.got()) == 13
    assert lab.counts() == {"accepted": 5, "done": 5}


async def test_a_sender_may_reuse_its_list(lab):
    class Reuse(lab.Pass):
        async def run(self, inlet, out):
            batch = []
            async for records in inlet:
                batch += records
                await out.send(batch)
                batch.clear()

    flow = lab.flow(
        {"source": lab.Source, "reuse": Reuse, "sink": (lab.Sink, {"buffer": 3})}, ["source -> reuse -> sink"]
    )
    await flow.run()
    assert len(lab.got()) == 10


async def test_a_send_that_times_out_is_still_delivered(lab):
    class Impatient(lab.Pass):
        async def process(self, records, out):
            with anyio.move_on_after(0.001):
                await out.send(records)

    class Slow(lab.Sink):
        async def process(self, records, out):
            await anyio.sleep(0.003)
            await super().process(records, out)

    flow = lab.flow(
        {"source": (lab.Source, {"count": 20}), "impatient": Impatient, "sink": (Slow, {"buffer": 1})},
        ["source -> impatient -> sink"],
    )
    await flow.run()
    assert [record.request_id for record in lab.got()] == [f"r{n}" for n in range(20)]


async def test_wrong_ports_and_things_that_are_no_records_are_said_clearly(lab):
    class WrongPort(lab.Pass):
        async def process(self, records, out):
            await out.send(records, "left")

    class NoRecord(lab.Pass):
        async def process(self, records, out):
            await out.send([{"prompt": "p"}])

    for cls, message in ((WrongPort, "has no output 'left', but 'out' or 'error'"), (NoRecord, "a dict is no record")):
        flow = lab.flow(
            {"source": lab.Source, "wrong": cls, "sink": lab.Sink}, ["source -> wrong -> sink", "wrong.error -> sink"]
        )
        await flow.run()
        assert message in lab.got()[0].error
        assert lab.counts() == {"accepted": 10, "error": 10}


async def test_graphs_that_cannot_run(lab):
    with pytest.raises(ConfigError, match="cycle through a, b"):
        lab.flow({"a": lab.Pass, "b": lab.Pass}, ["a -> b -> a"])
    with pytest.raises(ConfigError, match="no operator 'nobody'"):
        lab.flow({"a": lab.Source}, ["a -> nobody"])
    with pytest.raises(ConfigError, match="'a' is a source and takes no input"):
        lab.flow({"a": lab.Source, "b": lab.Pass}, ["b -> a"])


async def test_a_flow_runs_once(lab):
    flow = lab.flow({"source": lab.Source, "sink": lab.Sink}, ["source -> sink"])
    await flow.run()
    with pytest.raises(FlowError, match="a flow runs once"):
        await flow.run()


async def test_a_sequence_that_ended_in_an_error_counts_as_one(lab):
    class Broken(lab.Complete):
        async def process(self, records, out):
            await out.send([Sequence(r, None, r.sampling, error="device lost") for r in records])

    flow = lab.flow({"source": lab.Source, "broken": Broken, "sink": lab.Sink}, ["source -> broken -> sink"])
    await flow.run()
    assert lab.counts() == {"accepted": 10, "error": 10}
