"""Operators fail, flows drain and abort: no record vanishes, nobody hangs, every operator is closed."""

from __future__ import annotations

import anyio
import pytest

from sageLLM.errors import ErrorRatioExceededError, FlowError, OperatorFailedError, SourceChangedError
from sageLLM.records import DeadLetter, Request, Sequence, TokenDelta
from sageLLM.runtime.flow import supervisor
from sageLLM.runtime.flow.operator import RestartPolicy

pytestmark = pytest.mark.anyio


def at(*indices):
    return lambda index: "raise" if index in indices else "out"


def chain(lab, how, **options):
    return lab.flow(
        {"source": (lab.Source, {"count": 40}), "pass": (lab.Pass, {"how": how, **options}), "sink": lab.Sink,
         "dead": lab.Sink},
        ["source -> pass -> sink", "pass.error -> dead"],
    )  # fmt: skip


async def test_a_failed_operator_is_replaced_and_what_it_held_becomes_dead_letters(lab):
    flow = chain(lab, at(5, 20))
    report = await flow.run()
    assert report.operators["pass"]["restarts"] == 2
    assert lab.diary.count("pass open") == lab.diary.count("pass close") == 3
    letters = lab.got("dead")
    assert {letter.error for letter in letters} == {
        "operator 'pass' failed: ValueError: record 5", "operator 'pass' failed: ValueError: record 20"
    }  # fmt: skip
    ids = [record.request_id for record in [*lab.got(), *letters]]
    assert sorted(ids) == sorted(f"r{n}" for n in range(40))
    assert lab.counts() == {"accepted": 40, "done": 40 - len(letters), "error": len(letters)}


async def test_past_its_limit_the_flow_fails_and_every_request_is_told(lab):
    flow = chain(lab, lambda index: "raise", buffer=1)
    told = []
    flow.ledger.on_settled(told.extend)
    with pytest.raises(
        OperatorFailedError, match=r"'pass' failed 4 times in 60 s, the last time: ValueError: record 3"
    ):
        await flow.run()
    counts = lab.counts()
    assert counts["accepted"] == counts["error"] == len(told)
    for name in ("source", "pass", "sink", "dead"):
        assert lab.diary.count(f"{name} open") == lab.diary.count(f"{name} close")


async def test_failures_outside_the_window_are_forgotten(lab):
    policy = RestartPolicy(max_restarts=1, window_s=0.02, backoff_s=0.05)
    flow = chain(lab, at(3, 9, 15), restart=policy, buffer=1)
    await flow.run()
    assert flow.snapshot()["pass"]["restarts"] == 3


async def test_on_error_fail_also_holds_for_what_a_failure_leaves(lab):
    flow = chain(lab, at(5), on_error="fail")
    with pytest.raises(FlowError, match=r"operator 'pass' failed: ValueError: record 5 \(on_error: fail\)"):
        await flow.run()


async def test_errors_raised_on_purpose_are_not_retried(lab):
    class Changed(lab.Source):
        async def run(self, inlet, out):
            await super().run(inlet, out)
            raise SourceChangedError("the file has changed")

    flow = lab.flow({"source": Changed, "sink": lab.Sink}, ["source -> sink"])
    with pytest.raises(SourceChangedError, match="the file has changed"):
        await flow.run()
    assert flow.snapshot()["source"]["restarts"] == 0


@pytest.mark.parametrize("error", [SourceChangedError("changed"), OSError("no such device")])
async def test_an_operator_that_cannot_open_fails_the_flow_before_any_runs(lab, error):
    class Broken(lab.Pass):
        async def open(self):
            await super().open()
            raise error

    flow = lab.flow({"source": lab.Source, "broken": Broken, "sink": lab.Sink}, ["source -> broken -> sink"])
    with pytest.raises(SourceChangedError if isinstance(error, SourceChangedError) else OperatorFailedError) as caught:
        await flow.run()
    assert str(error) in str(caught.value)
    assert lab.diary == ["sink open", "broken open", *[line for line in lab.diary[2:] if line.endswith("close")]]
    assert sorted(lab.diary[2:]) == ["broken close", "sink close"]


async def test_an_operator_that_cannot_open_again_is_tried_as_often_as_its_policy_says(lab):
    class Once(lab.Pass):
        async def open(self):
            await super().open()
            if self.diary.count("pass open") > 1:
                raise OSError("device busy")

    flow = lab.flow(
        {"source": (lab.Source, {"count": None}), "pass": (Once, {"how": at(2)}), "sink": lab.Sink},
        ["source -> pass -> sink", "pass.error -> sink"],
    )
    with pytest.raises(OperatorFailedError, match="device busy"):
        await flow.run()
    assert lab.diary.count("pass open") == lab.diary.count("pass close") == 4


async def test_a_failure_inside_an_operators_task_group_is_that_failure(lab):
    class Grouped(lab.Pass):
        async def run(self, inlet, out):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(super().run, inlet, out)

    flow = lab.flow(
        {"source": lab.Source, "pass": (Grouped, {"how": at(4)}), "sink": lab.Sink, "dead": lab.Sink},
        ["source -> pass -> sink", "pass.error -> dead"],
    )
    await flow.run()
    assert lab.got("dead")[0].error == "operator 'pass' failed: ValueError: record 4"
    assert len(lab.got()) + len(lab.got("dead")) == 10


async def test_a_failed_sink_says_so_in_the_counts(lab):
    flow = lab.flow(
        {"source": (lab.Source, {"size": 1}), "sink": (lab.Sink, {"fail_at": 3, "buffer": 1})}, ["source -> sink"]
    )
    await flow.run()
    assert lab.counts() == {"accepted": 10, "done": 9, "error": 1}
    assert len(lab.got()) == 9


async def test_a_sink_that_cannot_close_fails_the_run(lab):
    class Unsynced(lab.Sink):
        async def close(self):
            raise OSError("fsync failed")

    flow = lab.flow({"source": lab.Source, "sink": Unsynced}, ["source -> sink"])
    with pytest.raises(OperatorFailedError, match="'sink' failed to close: OSError: fsync failed"):
        await flow.run()
    assert lab.counts() == {"accepted": 10, "done": 10}


async def test_closing_is_bounded_in_time(lab, monkeypatch):
    class Stuck(lab.Sink):
        async def close(self):
            await anyio.sleep_forever()

    monkeypatch.setattr(supervisor, "CLOSE_LIMIT_S", 0.01)
    flow = lab.flow({"source": lab.Source, "sink": Stuck}, ["source -> sink"])
    with pytest.raises(OperatorFailedError, match=r"'sink' did not close within 0\.01 s"):
        await flow.run()


@pytest.mark.parametrize("letters_wait", [False, True])
async def test_late_results_of_a_failed_operator_do_not_come_back_to_life(lab, letters_wait):
    """As a device worker gives them back to the new instance, after their dead letters are on the way."""
    outside = []

    class Door(lab.Pass):
        async def process(self, records, out):
            if not outside:
                outside.extend(Sequence(record, None, record.sampling) for record in records)
                raise ValueError("door broke")
            await out.send(outside)
            sent.set()
            await out.send(records)

    class Dead(lab.Sink):
        async def process(self, records, out):
            if letters_wait:
                await sent.wait()
            await super().process(records, out)

    sent = anyio.Event()
    flow = lab.flow(
        {"source": (lab.Source, {"count": 8}), "door": (Door, {"buffer": 4}), "sink": lab.Sink, "dead": Dead},
        ["source -> door -> sink", "door.error -> dead"],
    )
    await flow.run()
    assert [record.request_id for record in lab.got()] == ["r4", "r5", "r6", "r7"]
    assert lab.counts() == {"accepted": 8, "done": 4, "error": 4}


async def test_a_stream_that_lost_a_delta_is_cancelled(lab):
    class Deltas(lab.Complete):
        async def process(self, records, out):
            for record in records:
                await out.send([TokenDelta(Sequence(record, None, record.sampling), 0, [1]), lab.complete(record)])

    flow = lab.flow(
        {"source": (lab.Source, {"count": 1}), "deltas": Deltas,
         "pass": (lab.Pass, {"how": at(0)}), "sink": lab.Sink},
        ["source -> deltas -> pass -> sink", "pass.error -> sink"],
    )  # fmt: skip
    await flow.run()
    assert lab.got()[0].request.cancelled
    assert lab.counts() == {"accepted": 1, "cancelled": 1}


# -- draining and aborting ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffer", [1, 3, 1024])
async def test_a_drain_stops_the_sources_and_finishes_what_is_in(lab, buffer):
    flow = lab.flow(
        {"source": (lab.Source, {"count": None, "size": 16}), "hold": (lab.Hold, {"buffer": buffer}),
         "sink": (lab.Sink, {"buffer": buffer})},
        ["source -> hold -> sink"],
    )  # fmt: skip
    async with anyio.create_task_group() as tasks:

        async def drain_soon():
            while not lab.got():
                await anyio.lowlevel.checkpoint()
            flow.drain("enough")
            flow.drain("again")

        tasks.start_soon(drain_soon)
        report = await flow.run()
    assert report.drained == "enough"
    counts = lab.counts()
    assert counts == {"accepted": counts["accepted"], "done": counts["accepted"]}
    assert [record.request_id for record in lab.got()] == [f"r{n}" for n in range(counts["accepted"])]


async def test_a_source_that_drains_by_itself_waits_for_its_results(lab):
    """As one does that answers on connections: it takes no more, and stays until each request has its answer."""

    class Answering(lab.Source):
        count = None

        async def open(self):
            await super().open()
            self.drained, self.answered, self.told = anyio.Event(), anyio.Event(), 0
            self.context.ledger.on_settled(self.hear)

        def hear(self, settled):
            self.told += len(settled)
            if self.told == 10:
                self.answered.set()

        def drain(self):
            self.drained.set()
            return True

        async def run(self, inlet, out):
            requests = [Request(f"r{n}", prompt="p") for n in range(10)]
            await self.drained.wait()
            await out.send(requests)
            await out.end()
            await out.end()
            await self.answered.wait()
            self.note("answered")

    flow = lab.flow(
        {"source": Answering, "hold": lab.Hold, "complete": lab.Complete, "sink": lab.Sink},
        ["source -> hold -> complete -> sink"],
    )
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(flow.run)
        await anyio.sleep(0.05)
        flow.drain("enough")
    assert lab.counts() == {"accepted": 10, "done": 10}
    assert lab.diary.index("source answered") < lab.diary.index("source close")


async def test_a_drain_while_a_source_is_opened_again_is_not_told_to_what_is_not_open(lab):
    opened = []

    class Fragile(lab.Source):
        is_open = False

        async def open(self):
            if opened:
                await anyio.sleep(1)
            opened.append(self)
            self.is_open = True

        def drain(self):
            assert self.is_open
            return False

        async def run(self, inlet, out):
            if len(opened) == 1:
                raise RuntimeError("once")
            await super().run(inlet, out)

    flow = lab.flow({"source": (Fragile, {"count": None}), "sink": lab.Sink}, ["source -> sink"])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(flow.run)
        await anyio.sleep(0.5)
        assert len(opened) == 1
        flow.drain("enough")
    assert len(opened) == 2


async def test_a_drain_before_the_run_leaves_nothing_to_do(lab):
    flow = lab.flow({"source": (lab.Source, {"count": None}), "sink": lab.Sink}, ["source -> sink"])
    flow.drain("never mind")
    await flow.run()
    assert lab.counts() == {}


async def test_an_operator_can_ask_for_the_drain(lab):
    class Enough(lab.Sink):
        async def process(self, records, out):
            await super().process(records, out)
            flow.drain("the reader has gone")

    flow = lab.flow({"source": (lab.Source, {"count": None}), "sink": (Enough, {"buffer": 4})}, ["source -> sink"])
    assert (await flow.run()).drained == "the reader has gone"


async def test_an_abort_cancels_what_is_in_flight_and_closes_everything(lab):
    class Never(lab.Sink):
        async def process(self, records, out):
            self.options["got"] = records
            await anyio.sleep_forever()

    flow = lab.flow(
        {"source": (lab.Source, {"count": None}), "pass": (lab.Pass, {"buffer": 2}), "sink": (Never, {"buffer": 2})},
        ["source -> pass -> sink"],
    )
    told = []
    flow.ledger.on_settled(told.extend)

    async with anyio.create_task_group() as tasks:

        async def abort_soon():
            while not lab.got():
                await anyio.lowlevel.checkpoint()
            flow.abort("second signal")

        tasks.start_soon(abort_soon)
        with pytest.raises(FlowError, match="aborted: second signal"):
            await flow.run()
    counts = lab.counts()
    assert counts == {"accepted": counts["accepted"], "cancelled": counts["accepted"]} and len(told) > 0
    assert sorted(line for line in lab.diary if "close" in line) == ["pass close", "sink close", "source close"]


async def test_cancelling_the_run_from_outside_does_the_same(lab):
    flow = lab.flow({"source": (lab.Source, {"count": None}), "sink": (lab.Sink, {"buffer": 2})}, ["source -> sink"])
    with anyio.move_on_after(0.01) as scope:

        async def forever(records, out):
            await anyio.sleep_forever()

        flow.operators["sink"].process = forever
        await flow.run()
    assert scope.cancelled_caught
    counts = lab.counts()
    assert counts == {"accepted": counts["accepted"], "cancelled": counts["accepted"]}
    assert "sink close" in lab.diary and "source close" in lab.diary


# -- max_error_ratio ---------------------------------------------------------------------------------------------------


def half_bad(lab, count, ratio):
    return lab.flow(
        {"source": (lab.Source, {"count": count}),
         "pass": (lab.Pass, {"buffer": 4, "how": lambda index: "reject" if index % 2 else "out"}),
         "sink": lab.Sink, "dead": lab.Sink},
        ["source -> pass -> sink", "pass.error -> dead"],
        max_error_ratio=ratio,
    )  # fmt: skip


async def test_too_many_errors_stop_the_run_and_the_dead_letters_are_kept(lab):
    flow = half_bad(lab, None, 0.25)
    with pytest.raises(ErrorRatioExceededError, match=r"of \d+ records failed, more than max_error_ratio 25\.0%"):
        await flow.run()
    counts = lab.counts()
    assert counts["accepted"] == counts["done"] + counts["error"]
    assert len(lab.got("dead")) == counts["error"]


async def test_a_short_run_is_judged_at_its_end(lab):
    with pytest.raises(ErrorRatioExceededError, match=r"50\.0% of 4 records"):
        await half_bad(lab, 4, 0.25).run()
    assert lab.counts() == {"accepted": 4, "done": 2, "error": 2}


async def test_a_share_of_errors_within_the_limit_is_no_failure(lab):
    await half_bad(lab, 40, 0.9).run()
    assert lab.counts() == {"accepted": 40, "done": 20, "error": 20}


async def test_malformed_lines_count_towards_the_ratio(lab):
    class Lines(lab.Source):
        async def run(self, inlet, out):
            for _ in range(100):
                await out.reject([DeadLetter("not JSON")])
                await anyio.lowlevel.checkpoint()
            await out.send([Request("late", prompt="p")])

    flow = lab.flow(
        {"source": Lines, "sink": lab.Sink}, ["source -> sink", "source.error -> sink"], max_error_ratio=0.5
    )
    with pytest.raises(ErrorRatioExceededError):
        await flow.run()
    assert lab.counts()["accepted"] < 100
