"""Laws 2 and 3 under random faults: what went in came out, and no lease, block, task or thread is left.

`make_run(...)()` checks the counters and the leaks after every run; see conftest.py.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sageLLM.errors import FlowError, OperatorFailedError
from sageLLM.records import Request, SamplingParams

FAULTS = ("raise", "raise after", "drop", "reject", "cancel", "delay")
WHERE = ("tokenize", "kv_lookup", "schedule", "prefill", "kv_commit", "decode", "detokenize")

MODES = ({}, {"mode": "time_share"}, {"mode": "strict"}, {"mode": "strict", "prefill_workers": 2, "decode_workers": 2})

faults = st.dictionaries(
    st.sampled_from(WHERE),
    st.dictionaries(st.sampled_from(FAULTS), st.sampled_from((0.02, 0.1, 0.5)), min_size=1, max_size=3),
    min_size=1,
    max_size=3,
)
kv_caches = st.fixed_dictionaries({"max_tokens": st.sampled_from((64, 128, 512)), "block_size": st.just(4)})
tiers = st.sampled_from(({}, {"enable_tiering": True, "ddr_tokens": 32}, {"enable_tiering": True, "ddr_tokens": 512},
                         {"enable_tiering": True, "ddr_tokens": 256, "enable_migration": True}))  # fmt: skip
engines = st.fixed_dictionaries(
    {
        "kv_cache": st.builds(lambda kv_cache, tiers: kv_cache | tiers, kv_caches, tiers),
        "scheduler": st.fixed_dictionaries(
            {
                "max_batch_size": st.integers(3, 8),
                "max_step_tokens": st.sampled_from((8, 64)),
                "launch_ahead": st.booleans(),
                "tpot_slo_ms": st.sampled_from((None, 0.5, 20.0)),
            },
        ).flatmap(lambda common: st.sampled_from([{**common, **mode} for mode in MODES])),
    }
)
swapped = st.fixed_dictionaries(
    {
        "kv_cache": st.just({"max_tokens": 64, "block_size": 4, "enable_tiering": True, "ddr_tokens": 128}),
        "scheduler": st.sampled_from(MODES).map(
            lambda mode: {"max_batch_size": 6, "max_step_tokens": 16, "preemption": "swap", **mode}
        ),
    }
)
engines = engines | swapped
many = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)


@many
@given(faults=faults, engine=engines, seed=st.integers(0, 2**16), options=st.tuples(*[st.booleans()] * 3))
def test_operators_that_fail_on_any_edge(make_run, make_requests, faults, engine, seed, options):
    stream, pins, watched = options
    events = [] if watched else None
    run = make_run(make_requests(25, seed, stream, pins), engine, faults=faults, seed=seed, events=events)()
    assert run.error is None
    assert run.counts["accepted"] == 25
    run.check_everyone_had_one_end()


@many
@given(
    faults=faults,
    engine=engines,
    seed=st.integers(0, 2**16),
    how=st.sampled_from(("drain", "abort")),
    turns=st.integers(0, 400),
)
def test_drained_or_aborted_at_any_moment(make_run, make_requests, faults, engine, seed, how, turns):
    run = make_run(make_requests(25, seed, stream=True), engine, faults=faults, seed=seed, end=(how, turns))()
    if how == "drain":
        assert run.error is None
        run.check_everyone_had_one_end()
        assert run.flow.ledger.accepted + len(run.unsent) == 25, "a request was taken and is nowhere"
    elif run.error is not None:
        assert isinstance(run.error, FlowError)
        assert "aborted" in str(run.error)


@many
@given(seed=st.integers(0, 2**16), often=st.sampled_from((0.02, 0.2)))
def test_a_device_that_stumbles(make_run, make_requests, small_engine, seed, often):
    import random

    from sageLLM.runtime.worker import executor

    chance = random.Random(seed)
    launch = executor.NullExecutor.launch

    def stumble(self, plan):
        if chance.random() < often:
            raise RuntimeError("the device stumbled")
        handle = launch(self, plan)
        if chance.random() < often:
            handle.result = lambda: (_ for _ in ()).throw(RuntimeError("late"))
        return handle

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor.NullExecutor, "launch", stumble)
        patch.setattr(executor, "_NullHandle", type("Handle", (executor._NullHandle,), {"__slots__": ("result",)}))
        run = make_run(make_requests(25, seed), small_engine, seed=seed)()
    assert run.error is None
    run.check_everyone_had_one_end()
    assert run.counts.get("error", 0) == len(run.letters)


@settings(many, max_examples=12)
@given(seed=st.integers(0, 2**16), often=st.sampled_from((0.05, 0.5)), disk_holds=st.sampled_from((0, 10, 10**6)))
def test_tiers_that_stumble_on_a_disk_that_fills(make_run, make_requests, tmp_path, seed, often, disk_holds):
    import random

    from sageLLM.kv_runtime.tiers import NoBytesIO, block_file

    chance, written, writev = random.Random(seed), [], block_file.os.writev

    def stumble(self, *arguments):
        if chance.random() < often:
            raise RuntimeError("the copy stumbled")

    def fill(fd, parts):
        written.append(fd)
        if len(written) > disk_holds:
            raise OSError(28, "No space left on device")
        return writev(fd, parts)

    engine = {
        "kv_cache": {
            "max_tokens": 64, "block_size": 4, "enable_tiering": True, "ddr_tokens": 32, "nvme_tokens": 4096,
            "nvme_path": str(tmp_path / f"{seed} {often} {disk_holds}"),
        }
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for method in ("read", "write", "fence"):
            patch.setattr(NoBytesIO, method, stumble)
        patch.setattr(block_file.os, "writev", fill)
        run = make_run(make_requests(25, seed), engine, seed=seed)()
    assert run.error is None
    run.check_everyone_had_one_end()
    assert run.counts == {"accepted": 25, "done": 25}


@many
@given(engine=engines, seed=st.integers(0, 2**16), often=st.sampled_from((0.01, 0.1)), faults=st.just({}) | faults)
def test_an_executor_that_is_lost(make_run, make_requests, losing_executor, engine, seed, often, faults):
    """Whatever else fails: nobody but who waits longer notices."""
    import random

    from sageLLM.runtime.worker import executor

    chance = random.Random(seed)

    def losing(slots):
        return losing_executor(make(slots), lambda inner: inner._prompt_length.fill(0), chance, often)

    make = executor.NullExecutor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "NullExecutor", losing)
        run = make_run(make_requests(25, seed, stream=True), engine, faults=faults, seed=seed)()
    assert run.error is None
    run.check_everyone_had_one_end()
    if not faults:
        assert run.counts == {"accepted": 25, "done": 25}


@many
@given(seed=st.integers(0, 2**16), where=st.sampled_from(("schedule", "prefill", "decode")), nth=st.integers(1, 10))
def test_a_stage_of_ours_that_fails_and_is_restarted(make_run, make_requests, small_engine, seed, where, nth):
    """Whatever the stage had taken is rejected, whatever it had put into the worker is taken back."""
    from sageLLM.operators.decode import Decode
    from sageLLM.operators.prefill import Prefill
    from sageLLM.runtime.scheduler.lease import LeaseBook

    target, method = {
        "schedule": (LeaseBook, "grant"),
        "prefill": (Prefill, "_submit"),
        "decode": (Decode, "_submit"),
    }[where]
    original, calls = getattr(target, method), []

    def fail_once(self, argument):
        calls.append(None)
        result = original(self, argument)
        if len(calls) == nth:
            raise ValueError("the test says so")
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, method, fail_once)
        run = make_run(make_requests(25, seed), small_engine, seed=seed)()
    assert run.error is None
    run.check_everyone_had_one_end()
    if len(calls) >= nth:
        assert run.flow.report().operators[where]["restarts"] == 1


@settings(many, max_examples=15)
@given(faults=faults, engine=engines, seed=st.integers(0, 2**16), end=st.none() | st.just("drain") | st.just("abort"))
def test_the_same_with_the_worker_on_a_thread_of_its_own(make_run, make_requests, faults, engine, seed, end):
    from sageLLM.runtime.worker import driver

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "TaskDriver", driver.ThreadDriver)  # what a real device gets
        ending = None if end is None else (end, seed % 300)
        run = make_run(
            make_requests(25, seed, stream=True), engine, faults=faults, seed=seed, end=ending, backend="asyncio"
        )()
    if end != "abort":
        assert run.error is None
        run.check_everyone_had_one_end()


def test_an_operator_that_fails_for_ever_ends_everything(make_run, make_requests, small_engine):
    run = make_run(make_requests(25), small_engine, faults={"prefill": {"raise": 1.0}}, max_restarts=2)()
    assert isinstance(run.error, OperatorFailedError)
    assert "'after_prefill' failed 3 times" in str(run.error)
    assert run.counts == {"accepted": 25, "error": 25}


@pytest.mark.parametrize("where", ["decode", "detokenize"])
def test_a_stream_that_lost_tokens_is_not_computed_to_its_end(make_run, where):
    sampling = SamplingParams(max_new_tokens=5000, temperature=0)
    request = Request("r0", prompt_tokens=[5, 6, 7], sampling=sampling, stream=True)
    run = make_run([request], faults={where: {"raise": 0}})
    faults = iter(["raise"])
    run.next_fault = lambda node: next(faults, None)
    run()
    assert run.counts == {"accepted": 1, "cancelled": 1}
    (choice,) = run.completions["r0"].choices
    assert choice.finish_reason == "cancelled"
    assert len(choice.output_tokens) < 100
