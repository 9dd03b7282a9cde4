"""A step fails on the device: its own rows end with an error, all others compute what they would have without it."""

from __future__ import annotations

import pytest

from sageLLM.backends import detect_backend
from sageLLM.config import BackendConfig, ModelConfig
from sageLLM.models.resolve import resolve_model
from sageLLM.models.weights import load_model
from sageLLM.records import SamplingParams
from sageLLM.runtime.worker.torch_executor import TorchExecutor

CACHED = list(range(40, 53))
LONG = list(range(100, 132))  # takes four steps of its own
HIT = [*CACHED[:6], 7, 8, 9]  # six tokens of it are cached: a block and a half


@pytest.fixture(scope="module")
def loaded(checkpoint_folder):
    backend = detect_backend(BackendConfig(backend_type="cpu", threads=1))
    return load_model(resolve_model(ModelConfig(model_id=str(checkpoint_folder("qwen3")))), backend), backend


@pytest.fixture
def device_bench(bench, loaded):
    made = []

    def make(launch_ahead=True):
        made.append(TorchExecutor(*loaded, num_blocks=64, block_size=4, num_slots=8))
        b = bench(blocks=64, block_size=4, executor=made[-1], max_step_tokens=8, launch_ahead=launch_ahead)
        b.offer(b.sequence(CACHED, max_new_tokens=2))
        b.run()
        return b, made[-1]

    yield make
    for executor in made:
        executor.close()


def fail_once(monkeypatch, target, method, nth=1):
    """Have the nth call of a method raise."""
    original, calls = getattr(target, method), []

    def stumble(*args, **options):
        calls.append(None)
        if len(calls) == nth:
            raise RuntimeError("out of memory")
        return original(*args, **options)

    monkeypatch.setattr(target, method, stumble)


def outputs_of(sequence):
    return [choice.output_tokens for choice in sequence.choices]


def where(executor, what):
    return {
        "launch": (executor._thread, "submit"),
        "copies": (executor._backend, "copy_blocks"),
        "forward": (executor._model, "forward"),
    }[what]


@pytest.mark.parametrize("launch_ahead", [False, True])
@pytest.mark.parametrize("what", ["launch", "copies", "forward"])
def test_a_row_that_waits_behind_the_failed_step_gets_its_cached_block(device_bench, monkeypatch, what, launch_ahead):
    def run(fault=None):
        b, executor = device_bench(launch_ahead)
        long, hit = b.sequence(LONG), b.sequence(HIT, max_new_tokens=8)
        b.offer(long, hit)
        if fault:
            fail_once(monkeypatch, *where(executor, fault))
        b.run()
        b.check_nothing_leaks()
        assert hit.prefix_hit_tokens == 6
        assert hit.error is None
        return long, outputs_of(hit)

    _, expected = run()
    long, outputs = run(what)
    assert "out of memory" in long.error
    assert outputs == expected


@pytest.mark.parametrize("what", ["launch", "copies", "forward"])
def test_a_choice_gets_its_copy_of_the_prompts_last_block(device_bench, monkeypatch, what):
    def run(fault=None):
        b, executor = device_bench()
        forked = b.sequence([5, 6, 7, 8, 9, 10], max_new_tokens=8, n=2, temperature=1.0, seed=3)
        long = b.sequence(LONG)
        b.offer(forked, long)
        if fault:  # in the step after the one that computes the short prompt
            fail_once(monkeypatch, *where(executor, fault), nth=1 if fault == "copies" else 2)
        b.run()
        b.check_nothing_leaks()
        assert forked.error is None
        return long, outputs_of(forked)

    _, expected = run()
    long, outputs = run(what)
    assert "out of memory" in long.error
    assert outputs == expected


@pytest.mark.parametrize("what", ["launch", "admission"])
def test_a_row_that_waits_behind_the_failed_step_samples_as_it_was_asked_to(device_bench, monkeypatch, what):
    def run(fault=None):
        b, executor = device_bench()
        long = b.sequence(LONG)
        asked = b.sequence([5, 6, 7], max_new_tokens=8, temperature=1.0, seed=3, presence_penalty=1.0)
        b.offer(long, asked)
        if fault:
            fail_once(monkeypatch, *((executor._sampling, "admit") if fault == "admission" else where(executor, fault)))
        b.run()
        b.check_nothing_leaks()
        assert asked.error is None
        return long, outputs_of(asked)

    _, expected = run()
    long, outputs = run(what)
    assert "out of memory" in long.error
    assert outputs == expected


def test_a_row_that_cannot_be_sampled_fails_none_that_comes_after_it(device_bench):
    b, _ = device_bench()
    bad = b.sequence([5, 6, 7])
    bad.sampling = SamplingParams(top_p=7.0, max_new_tokens=4)  # an operator behind `schedule` has changed it
    after = b.sequence([5, 6, 8])
    b.offer(bad)
    b.run()
    b.offer(after)
    b.run()
    assert "top_p" in bad.error
    assert after.error is None
    b.check_nothing_leaks()
