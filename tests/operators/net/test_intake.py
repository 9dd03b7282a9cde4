"""Intake: requests of a listening source come in, are refused with a reason, and are told exactly one end."""

from __future__ import annotations

import anyio
import pytest

from sageLLM.config import SageLLMConfig
from sageLLM.operators.sources.net.intake import Intake, IntakeConfig
from sageLLM.operators.sources.net.keys import KeyRing, KeysConfig
from sageLLM.records import Choice, Completion, Request
from sageLLM.runtime.calls import Caller, tell_end
from sageLLM.runtime.flow.ledger import Ledger, Outcome
from sageLLM.runtime.flow.operator import OperatorContext
from sageLLM.runtime.services import EngineServices


class Notes(Caller):
    """Writes down the end it is told."""

    end = None

    def receive_end(self, record, outcome):
        assert self.end is None
        self.end = (record, outcome)


class Outlet:
    """Keeps what is sent; accepts it, as a flow's outlet does; `gate` may hold it back."""

    def __init__(self, ledger):
        self.sent, self.ended, self.gate, self._ledger = [], False, anyio.Event(), ledger
        self.gate.set()

    async def send(self, records):
        self._ledger.accept(records)
        self.sent += records
        await self.gate.wait()

    async def end(self):
        self.ended = True


class Bench:
    """An intake while it runs."""

    def __init__(self, tmp_path, **config):
        self.now = 0.0
        services = EngineServices(
            SageLLMConfig.model_validate({"model": {"model_id": "builtin:null"}}), lambda: self.now
        )
        self.ledger = Ledger()
        self.context = OperatorContext("tcp", services, self.ledger, tmp_path, lambda reason: None)
        self.intake = Intake(self.context, IntakeConfig(**config))
        self.out = Outlet(self.ledger)
        self.ledger.on_settled(lambda settled: [tell_end(request, None, outcome) for request, outcome in settled])
        self.folder = tmp_path

    def submit(self, name="r", key=None, **fields):
        request, caller = Request(name, prompt="hi", **fields), Notes()
        return self.intake.submit(request, caller, key), request, caller

    def finish(self, request, tokens=0):
        completion = Completion(request, [Choice(output_tokens=[1] * tokens)], 0)
        tell_end(request, completion, Outcome.DONE)
        self.ledger.settle([(request, Outcome.DONE)])

    def key(self, text):
        (self.folder / "keys.yaml").write_text(text)
        return KeyRing.load(KeysConfig(keys="keys.yaml"), self.folder, lambda: self.now).authenticate("k")


@pytest.fixture
def bench(tmp_path, loop_name):
    """`bench(body, **config)` runs `await body(bench)` beside a running intake, which it must bring to its end."""

    def run(body, **config):
        async def main():
            it = Bench(tmp_path, **config)
            with anyio.fail_after(30):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(it.intake.run, it.out)
                    await anyio.wait_all_tasks_blocked()
                    await body(it)
                    it.intake.drain()
            it.ledger.check()
            assert it.out.ended
            assert it.intake.in_flight == 0

        anyio.run(main, backend=loop_name)

    return run


def test_what_is_submitted_is_sent_on_and_told_its_end(bench):
    async def body(it):
        refused, request, caller = it.submit("a")
        assert refused is None
        assert request.interactive
        await anyio.wait_all_tasks_blocked()
        assert it.out.sent == [request]
        assert it.intake.in_flight == 1
        it.finish(request)
        assert caller.end[1] is Outcome.DONE
        assert it.intake.in_flight == 0

    bench(body)


def test_one_more_than_max_in_flight_is_shed_and_counted(bench):
    async def body(it):
        kept = [it.submit() for _ in range(2)]
        await anyio.wait_all_tasks_blocked()
        it.now = 7.0
        refusal, _, caller = it.submit()
        assert (refusal.kind, refusal.queue_depth, refusal.retry_after_s) == ("shed", 2, 7)
        assert caller.end is None
        assert it.ledger.counters()["shed"] == 1
        it.finish(kept[0][1])
        assert it.submit("again")[0] is None
        for request in it.out.sent[1:]:
            it.finish(request)
        await anyio.wait_all_tasks_blocked()
        it.finish(it.out.sent[-1])

    bench(body, max_in_flight=2)


def test_retry_after_follows_the_pace_of_late(bench):
    async def body(it):
        for _ in range(10):  # one in two seconds
            _, request, _ = it.submit()
            await anyio.wait_all_tasks_blocked()
            it.now += 2
            it.finish(request)
        held = [it.submit()[1] for _ in range(4)]
        await anyio.wait_all_tasks_blocked()
        assert it.submit()[0].retry_after_s == pytest.approx(8, abs=1)
        it.now += 1000
        assert it.submit()[0].retry_after_s == 60
        for request in held:
            it.finish(request)

    bench(body, max_in_flight=4)


def test_a_key_says_whose_requests_they_are_and_how_many(bench):
    async def body(it):
        key = it.key("- {key: k, name: alice, tenant: team, max_in_flight: 1, tokens_per_minute: 60}")
        _, request, _ = it.submit(key=key, tenant="somebody else's")
        assert request.tenant == "team"
        refusal, _, _ = it.submit(key=key)
        assert (refusal.kind, refusal.retry_after_s) == ("rate_limit", 1)
        it.finish(request, tokens=100)
        refusal, _, _ = it.submit(key=key)
        assert refusal.message == "the key may use 60 tokens per minute"
        assert refusal.retry_after_s == 40
        assert it.ledger.counters()["shed"] == 2

    bench(body)


def test_cancelling_what_has_not_entered_the_pipeline_ends_it_at_once(bench):
    async def body(it):
        it.out.gate = anyio.Event()  # the pipeline takes nothing
        _, first, _ = it.submit("first")
        await anyio.wait_all_tasks_blocked()
        _, second, caller = it.submit("second")
        it.intake.cancel([second])
        assert caller.end == (None, Outcome.CANCELLED)
        it.intake.cancel([first])
        assert first.cancelled
        it.out.gate.set()
        await anyio.wait_all_tasks_blocked()
        assert it.out.sent == [first]
        it.ledger.settle([(first, Outcome.CANCELLED)])

    bench(body)


def test_cancelling_reaches_every_copy(bench):
    async def body(it):
        _, request, caller = it.submit()
        await anyio.wait_all_tasks_blocked()
        copy = Request("r", prompt="hi", caller=request.caller)
        it.ledger.fork_request(request, copy)
        it.intake.cancel([request])
        assert (request.cancelled, copy.cancelled) == (True, True)
        it.ledger.settle([(request, Outcome.CANCELLED), (copy, Outcome.CANCELLED)])
        assert caller.end == (None, Outcome.CANCELLED)

    bench(body)


def test_draining_takes_no_more_and_stays_for_the_ends(bench):
    async def body(it):
        _, request, caller = it.submit()
        await anyio.wait_all_tasks_blocked()
        it.intake.drain()
        refusal, _, _ = it.submit()
        assert (refusal.kind, refusal.retry_after_s) == ("closing", 30)
        await anyio.wait_all_tasks_blocked()
        assert it.out.ended  # what is downstream may end, while the answer is still waited for
        it.finish(request)
        assert caller.end[1] is Outcome.DONE

    bench(body)


def test_what_has_not_ended_by_the_deadline_is_cancelled(bench):
    async def body(it):
        _, request, _ = it.submit()
        await anyio.wait_all_tasks_blocked()
        it.intake.drain()
        while not request.cancelled:  # noqa: ASYNC110 - a request has no event for it
            await anyio.sleep(0.001)
        it.ledger.settle([(request, Outcome.CANCELLED)])

    bench(body, drain_timeout_s=0)


def test_when_the_flow_goes_everybody_is_told_an_error(tmp_path, on_loop):
    async def main():
        it = Bench(tmp_path)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(it.intake.run, it.out)
            _, _, caller = it.submit()
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        record, outcome = caller.end
        assert (record.error, outcome) == ("the server was stopped before the request had ended", Outcome.ERROR)
        assert it.submit()[0].kind == "closing"

    on_loop(main)


def test_when_only_the_source_fails_what_it_had_sent_is_not_computed_any_longer(tmp_path, on_loop):
    async def main():
        it = Bench(tmp_path)
        it.out.gate = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(it.intake.run, it.out)
            _, sent, _ = it.submit()
            await anyio.wait_all_tasks_blocked()
            _, waiting, caller = it.submit()
            tasks.cancel_scope.cancel()
        assert sent.cancelled and it.ledger.is_open(sent)
        assert caller.end is not None and not it.ledger.is_open(waiting)
        assert it.ledger.counters()["error"] == 1
        it.ledger.settle([(sent, Outcome.CANCELLED)])
        it.ledger.check()

    on_loop(main)
