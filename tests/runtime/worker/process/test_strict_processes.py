"""Mode strict with each worker in a process of its own: KV goes straight from one process to the other's pool."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sageLLM import GenerateRequest, SageLLMConfig, SageLLMEngine
from sageLLM.backends import detect_backend
from sageLLM.config import BackendConfig
from sageLLM.errors import ExecutorLostError, RequestError
from sageLLM.runtime.scheduler.plan import KVExport, StepPlan
from sageLLM.runtime.worker.process.remote_executor import RemoteExecutor
from sageLLM.runtime.worker.process.shared_pool import PoolSharing, open_pool

from .conftest import processes_of

_RNG = random.Random(7)
_BASE = [_RNG.randrange(4, 300) for _ in range(40)]
PROMPTS = [
    _BASE[:n] + [_RNG.randrange(4, 300) for _ in range(m)] for n, m in ((0, 1), (0, 9), (13, 1), (17, 6), (40, 12))
]


def config(model, engine=None, **scheduler):
    patient = {"queue_timeout_s": 0, "request_timeout_s": 0}  # a process may take long to start where tests run
    strict = (
        {"isolation": "process", "mode": "strict", "max_batch_size": 4, "max_step_tokens": 16} | patient | scheduler
    )
    return SageLLMConfig(
        model={"model_id": str(model)},
        kv_cache={"max_tokens": 512, "block_size": 4},
        scheduler=strict,
        **(engine or {"backend": {"backend_type": "cpu", "threads": 1}}),
    )


def null(**scheduler):
    return config("builtin:null", {"backend": {}}, **scheduler)


# -- one executor at a time ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def started():
    executors = [RemoteExecutor(null(), worker) for worker in (0, 1)]
    executors[0].connect([executors[1].pool])
    yield executors
    for executor in executors:
        executor.close()


@pytest.fixture
def pair(started):
    """The executors of a prefill and a decode worker, on the null model."""
    for executor in started:
        wait_until(executor.ready)
    return started


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def exporting_plan(done, count=2):
    none, blocks = np.empty(0, np.int64), np.zeros(1, np.int32)
    exports = [
        KVExport(0, 0, 0, 0, 4, blocks, blocks, lambda index=index: done.append(index)) for index in range(count)
    ]
    return StepPlan(none, none, [], np.zeros((0, 1), np.int32), [], none, none, none, none, exports)


def test_exports_are_done_once(pair):
    prefill, done = pair[0], []
    for _ in range(3):
        assert prefill.launch(exporting_plan(done)).result().failed_exports == {}
    wait_until(lambda: not prefill._exporting)
    assert sorted(done) == [0, 0, 0, 1, 1, 1]


def test_exports_to_a_worker_that_is_being_started_fail(pair):
    prefill, decode = pair
    os.kill(decode._child.pid, signal.SIGKILL)
    with pytest.raises(ExecutorLostError):
        wait_until(lambda: not decode.ready())
    done = []
    result = prefill.launch(exporting_plan(done)).result()
    assert result.failed_exports.keys() == {0, 1}
    assert "is being started" in result.failed_exports[0]
    assert done == [0, 1]
    wait_until(decode.ready)
    assert prefill.launch(exporting_plan(done)).result().failed_exports == {}


@pytest.mark.parametrize("when", ["before the launch", "after the launch"])
def test_exports_of_a_worker_that_is_killed_are_done_once(pair, when):
    prefill, done = pair[0], []
    os.kill(prefill._child.pid, signal.SIGSTOP)
    prefill.launch(exporting_plan([]))
    if when == "after the launch":
        step = prefill.launch(exporting_plan(done))
        os.kill(prefill._child.pid, signal.SIGKILL)
        with pytest.raises(ExecutorLostError):
            step.result()
        assert sorted(done) == [0, 1]
    else:
        os.kill(prefill._child.pid, signal.SIGKILL)
        wait_until(lambda: prefill._child.has_ended)
        with pytest.raises(ExecutorLostError):
            prefill.launch(exporting_plan(done))
        assert done == []  # it was not taken: they are the worker's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pool_is_mapped_twice(dtype):
    backend = detect_backend(BackendConfig(backend_type="cpu"))
    sharing = PoolSharing()
    pool = sharing.allocate(backend, (3, 2, 2, 2, 4, 8), dtype)
    assert not pool.any()
    description, descriptors = sharing.describe(pool)
    other = open_pool(description, list(descriptors))
    other[1] = 3.0
    assert torch.equal(pool, other)
    assert pool.data_ptr() != other.data_ptr()


# -- the whole engine ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(checkpoint_folder):
    with SageLLMEngine(config(checkpoint_folder("qwen3"))) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(checkpoint_folder):
    """What a prompt gives in one process, in float32 and whatever mixes it is in; law 1 compares that with
    transformers."""
    cpu = {"backend_type": "cpu", "threads": 1}
    with SageLLMEngine(SageLLMConfig(model={"model_id": str(checkpoint_folder("qwen3"))}, backend=cpu)) as engine:
        outputs = engine.generate([request(prompt, 24) for prompt in PROMPTS])
    return {tuple(prompt): output.output_tokens for prompt, output in zip(PROMPTS, outputs, strict=True)}


def request(prompt, count):
    return GenerateRequest(prompt_tokens=prompt, max_new_tokens=count, temperature=0, ignore_eos=True)


def check_nothing_leaks(engine):
    services = engine._services
    books = [*services.leases.prefill, *services.leases.decode]

    def is_back(book):
        return book.free_slots == book.num_slots and not book.any_in_transit and not book.load

    # the prefill worker lets go after the decode worker has taken over
    wait_until(lambda: all(map(is_back, books)) and not any(executor._exporting for executor in services.executors))
    for book in books:
        book.kv.check_integrity(owners=[])


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(picks=st.lists(st.tuples(st.sampled_from(PROMPTS), st.integers(1, 24)), min_size=1, max_size=8))
def test_tokens_are_those_of_one_process(engine, alone, picks):
    outputs = engine.generate([request(prompt, count) for prompt, count in picks])
    for output, (prompt, count) in zip(outputs, picks, strict=True):
        assert output.output_tokens == alone[tuple(prompt)][:count]
    check_nothing_leaks(engine)


@pytest.mark.parametrize("whom", [0, 1], ids=["prefill", "decode"])
def test_a_worker_that_is_killed_under_load_changes_no_token(engine, alone, whom):
    process = engine._services.executors[whom]
    before, pid = engine._services.worker.steps, process._child.pid

    def kill():
        wait_until(lambda: engine._services.worker.steps >= before + 12)
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    picks = [(prompt, 24) for prompt in PROMPTS * 3]
    outputs = engine.generate([request(prompt, count) for prompt, count in picks])
    killer.join()
    for output, (prompt, count) in zip(outputs, picks, strict=True):
        assert output.output_tokens == alone[tuple(prompt)][:count]
    outputs = engine.generate([request(prompt, 8) for prompt in PROMPTS])  # with the new one
    assert [output.output_tokens for output in outputs] == [alone[tuple(prompt)][:8] for prompt in PROMPTS]
    assert process._child.pid != pid
    check_nothing_leaks(engine)


def test_killed_again_and_again_everybody_gets_one_end(null_tokens):
    chance, before = random.Random(5), processes_of()
    with SageLLMEngine(null(prefill_workers=2, on_transfer_failure="fail")) as engine:
        stopped = threading.Event()
        deaths = []

        def kill():
            workers = [*zip(engine._services.worker.workers, engine._services.executors, strict=True)]
            while len(deaths) < 2 and not stopped.wait(chance.uniform(0.02, 0.1)):
                worker, process = chance.choice(workers)
                child, steps = process._child, worker.steps
                if child is not None and not child.has_ended:
                    os.kill(child.pid, signal.SIGKILL)
                    deaths.append(child.pid)
                while worker.steps < steps + 4 and not stopped.wait(0.002):
                    pass

        ends = [None] * 60

        def run(index):
            try:
                ends[index] = engine.generate(request([index] * (1 + index % 30), 40)).output_tokens
            except RequestError as error:
                ends[index] = str(error)

        killer = threading.Thread(target=kill)
        callers = [threading.Thread(target=run, args=(index,)) for index in range(len(ends))]
        for thread in (killer, *callers):
            thread.start()
        for thread in callers:
            thread.join()
        stopped.set()
        killer.join()
        check_nothing_leaks(engine)
    assert deaths
    assert processes_of() <= before
    for index, end in enumerate(ends):
        if isinstance(end, str):
            assert "its KV could not be handed over to decode" in end
        else:
            assert end == null_tokens(1 + index % 30, 40)


def test_what_was_handed_over_too_late_is_computed_again(checkpoint_folder, alone):
    """So short a limit that some or all are late."""
    with SageLLMEngine(config(checkpoint_folder("qwen3"), transfer_timeout_s=1e-9, max_step_tokens=64)) as engine:
        outputs = [engine.generate(request(prompt, 24)) for prompt in PROMPTS]
        check_nothing_leaks(engine)
    assert [output.output_tokens for output in outputs] == [alone[tuple(prompt)] for prompt in PROMPTS]
