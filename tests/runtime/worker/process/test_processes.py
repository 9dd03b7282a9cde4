"""Worker processes for real: killed, hanging, never starting, left behind. On the null model, which starts at once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from sageLLM import GenerateRequest, SageLLMConfig, SageLLMEngine
from sageLLM.errors import ConfigError, ExecutorLostError, RequestError
from sageLLM.runtime.scheduler.plan import PromptChunk, StepPlan
from sageLLM.runtime.worker.process.remote_executor import RemoteExecutor

from .conftest import processes_of

# A process may take long to start where tests run.
PATIENT = {"isolation": "process", "queue_timeout_s": 0, "request_timeout_s": 0}


def config(**scheduler):
    return SageLLMConfig(model={"model_id": "builtin:null"}, scheduler={**PATIENT, **scheduler})


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def prompt_plan(slot, tokens):
    slots, first = np.array([slot]), np.zeros(1, np.int64)
    chunk = PromptChunk(slot, 0, 0, np.array(tokens, np.int32), True)
    none = np.empty(0, np.int64)
    return StepPlan(none, none, [chunk], np.zeros((1, 1), np.int32), [], slots, first, first, first)


@pytest.fixture
def executor():
    executor = RemoteExecutor(config())
    executor.wait_until_ready()
    yield executor
    executor.close()


@pytest.fixture
def admit(bench):
    b = bench()
    return lambda executor, slot, prompt: executor.admit(slot, b.sequence(prompt), 0)


def test_results_come_in_the_order_of_the_plans_that_were_sent_ahead(executor, admit, null_tokens):
    for slot in range(4):
        admit(executor, slot, range(slot + 1))
    steps = [executor.launch(prompt_plan(slot, range(slot + 1))) for slot in range(4)]
    assert [step.result().tokens.tolist() for step in steps] == [null_tokens(n, 1) for n in (1, 2, 3, 4)]


def test_what_a_step_raises_there_is_raised_here_and_the_next_one_runs(executor, admit, null_tokens):
    admit(executor, 0, [1, 2])
    bad = executor.launch(prompt_plan(10**6, [1]))
    good = executor.launch(prompt_plan(0, [1, 2]))
    with pytest.raises(IndexError):
        bad.result()
    assert good.result().tokens.tolist() == null_tokens(2, 1)


def test_it_ends_in_peace_and_leaves_no_process(executor):
    before = processes_of(os.getpid())
    executor.close()
    assert len(before - processes_of(os.getpid())) == 1
    executor.close()


def test_an_executor_that_nobody_closed_takes_its_process_along():
    executor = RemoteExecutor(config())
    executor.wait_until_ready()
    (pid,) = processes_of(os.getpid())
    del executor
    assert pid not in processes_of(os.getpid())


def test_killed_while_idle_it_tells_and_starts_again(executor, admit, null_tokens):
    ended = threading.Event()
    executor.on_exit = ended.set
    (pid,) = processes_of(os.getpid())
    os.kill(pid, signal.SIGKILL)
    assert ended.wait(30)
    assert pid not in processes_of(os.getpid()), "a zombie is left"
    with pytest.raises(ExecutorLostError, match=f"of worker 0 was lost: process {pid} was killed by SIGKILL"):
        executor.ready()
    wait_until(executor.ready)
    admit(executor, 0, [1, 2])
    assert executor.launch(prompt_plan(0, [1, 2])).result().tokens.tolist() == null_tokens(2, 1)


@pytest.mark.parametrize("moment", ["launched", "starting"])
def test_a_kill_is_told_whatever_the_parent_waits_for(executor, admit, moment):
    (pid,) = processes_of(os.getpid())
    os.kill(pid, signal.SIGSTOP)
    admit(executor, 0, [1, 2])
    step = executor.launch(prompt_plan(0, [1, 2]))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ExecutorLostError, match="killed by SIGKILL"):
        step.result()
    with pytest.raises(ExecutorLostError):
        executor.launch(prompt_plan(0, [1, 2]))
    if moment == "starting":
        assert not executor.ready()
        (pid,) = processes_of(os.getpid())
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ExecutorLostError, match=f"process {pid} was killed by SIGKILL"):
            wait_until(executor.ready)


def test_one_that_hangs_is_ended(admit):
    executor = RemoteExecutor(config(step_timeout_s=0.05))
    executor.wait_until_ready()
    (pid,) = processes_of(os.getpid())
    admit(executor, 0, [1, 2])
    os.kill(pid, signal.SIGSTOP)
    step = executor.launch(prompt_plan(0, [1, 2]))
    with pytest.raises(ExecutorLostError, match=f"process {pid} took more than 0.05 s for a step"):
        step.result()
    assert pid not in processes_of(os.getpid())
    executor.close()


def test_what_the_process_cannot_build_is_raised_here():
    bad = SageLLMConfig(model={"model_id": "builtin:null"}, backend={"threads": 3}, scheduler={"isolation": "process"})
    with pytest.raises(ConfigError, match="builtin:null runs on no device"):
        RemoteExecutor(bad).wait_until_ready()
    assert not processes_of(os.getpid())


def test_under_load_every_request_gets_its_tokens_whenever_it_is_killed(null_tokens):
    chance = random.Random(3)
    requests = [
        GenerateRequest(prompt_tokens=[7] * chance.randint(1, 40), max_new_tokens=400, temperature=0, ignore_eos=True)
        for _ in range(24)
    ]
    with SageLLMEngine(config(max_batch_size=8, max_step_tokens=64)) as engine:
        stopped = threading.Event()
        killed = []

        def kill():
            due = 5  # three deaths without a step in between would end the worker
            while not stopped.wait(0.001):
                steps = engine.get_stats()["worker"]["steps"]
                if steps >= due:
                    for pid in processes_of(os.getpid()):
                        os.kill(pid, signal.SIGKILL)
                        killed.append(pid)
                    due = steps + chance.randint(300, 600)

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            outputs = engine.generate(requests)
        finally:
            stopped.set()
            killer.join()
        services = engine._services
        services.kv.check_integrity(owners=[])
        assert services.leases.free_slots == services.leases.num_slots
    assert killed
    for request, output in zip(requests, outputs, strict=True):
        assert output.output_tokens == null_tokens(len(request.prompt_tokens), 400)
    assert not processes_of(os.getpid())


def test_one_that_dies_at_every_start_ends_the_requests_with_an_error(monkeypatch):
    with SageLLMEngine(config()) as engine:
        (executor,) = engine._services.executors
        executor._task = {"model": {"model_id": "/nowhere"}}, 0
        for pid in processes_of(os.getpid()):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(RequestError, match="no such folder; 4 times without a step in between"):
            engine.generate(GenerateRequest(prompt_tokens=[1, 2, 3], max_new_tokens=4))


PARENT = """
import sys, time
from sageLLM import SageLLMConfig
from sageLLM.runtime.worker.process.remote_executor import RemoteExecutor
executor = RemoteExecutor(SageLLMConfig(model={"model_id": "builtin:null"}, scheduler={"isolation": "process"}))
executor.wait_until_ready()
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_no_orphan_when_the_parent_is_killed(stopped):
    """Also when the child cannot look: the kernel ends it."""
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(PARENT)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"ready\n"
        (pid,) = processes_of(parent.pid)
        os.kill(pid, signal.SIGINT)  # Ctrl-C is the parent's business
        os.kill(pid, signal.SIGTERM)
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        assert os.getpgid(pid) != os.getpgid(parent.pid)
        parent.kill()
        wait_until(lambda: not is_alive(pid))


def is_alive(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
