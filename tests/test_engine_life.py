"""Starting and stopping the engine from several threads, and being interrupted while the model loads."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import Future

import pytest

from sageLLM import GenerateRequest, ModelConfig, SageLLMConfig, SageLLMEngine
from sageLLM.errors import ConfigError, EngineClosedError, FlowError, NotAvailableError, RequestError
from sageLLM.models import weights
from sageLLM.operators.sinks.reply_sink import ReplySink
from sageLLM.runtime.services import EngineServices

LIMIT_S = 30


@pytest.fixture
def slow_engine(monkeypatch):
    """An engine on the null model whose loading waits: (engine, is loading, may go on)."""
    loading, go = threading.Event(), threading.Event()
    load = EngineServices.load

    def load_slowly(services):
        loading.set()
        assert go.wait(LIMIT_S)
        load(services)

    monkeypatch.setattr(EngineServices, "load", load_slowly)
    engine = SageLLMEngine(SageLLMConfig(model=ModelConfig(model_id="builtin:null")))
    yield engine, loading, go
    go.set()


def in_background(function):
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def ended(*threads):
    for thread in threads:
        thread.join(LIMIT_S)
    return not any(thread.is_alive() for thread in threads)


def test_shutdown_while_the_model_loads_ends_the_engine(slow_engine):
    engine, loading, go = slow_engine
    starting = in_background(engine.initialize)
    assert loading.wait(LIMIT_S)
    stopping = in_background(engine.shutdown)
    stopping.join(0.1)
    go.set()
    assert ended(starting, stopping)
    assert not engine.get_stats()["initialized"]


def test_a_second_initialize_waits_for_the_first(slow_engine):
    engine, loading, go = slow_engine
    starting = in_background(engine.initialize)
    assert loading.wait(LIMIT_S)
    seen = []

    def start_and_use():
        engine.initialize()
        seen.append(engine.generate(GenerateRequest(prompt="a", max_new_tokens=2)).output_tokens)

    second = in_background(start_and_use)
    second.join(0.1)
    go.set()
    assert ended(starting, second)
    assert [len(tokens) for tokens in seen] == [2]
    engine.shutdown()


def test_an_interrupt_while_the_model_loads_leaves_nothing_running(slow_engine, monkeypatch):
    engine, _, go = slow_engine

    class InterruptedFuture(Future):
        def result(self, timeout=None):
            go.set()
            raise KeyboardInterrupt

    monkeypatch.setattr("sageLLM.engine.Future", InterruptedFuture)
    raised, threads_before = [], threading.enumerate()

    def start():
        try:
            engine.initialize()
        except KeyboardInterrupt as error:
            raised.append(error)

    assert ended(in_background(start))
    assert raised
    new = [thread for thread in threading.enumerate() if thread not in threads_before]
    assert not [thread for thread in new if thread.name == "sagellm-engine"]


@pytest.fixture
def null_engine():
    engine = SageLLMEngine(SageLLMConfig(model=ModelConfig(model_id="builtin:null")))
    yield engine
    engine.shutdown()


@pytest.mark.parametrize("as_list", [False, True])
def test_an_interrupted_call_cancels_its_requests(null_engine, monkeypatch, as_list):
    class InterruptedFuture(Future):
        def result(self, timeout=None):
            raise KeyboardInterrupt

    null_engine.initialize()
    monkeypatch.setattr("sageLLM.runtime.calls.Future", InterruptedFuture)
    requests = [GenerateRequest(prompt="a", max_new_tokens=20_000, ignore_eos=True) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt):
        null_engine.generate(requests if as_list else requests[0])
    monkeypatch.undo()
    flow = null_engine._flow
    null_engine.shutdown()  # waits for what is in flight
    count = 2 if as_list else 1
    assert {name: n for name, n in flow.ledger.counters().items() if n} == {"accepted": count, "cancelled": count}


def fail_when_called(monkeypatch):
    async def fail(sink, records, out):
        raise FlowError("no such caller")

    monkeypatch.setattr(ReplySink, "process", fail)


def test_a_failed_engine_says_why_and_starts_afresh(null_engine, monkeypatch):
    null_engine.initialize()
    ask = GenerateRequest(prompt="a", max_new_tokens=2)
    with monkeypatch.context() as patch:
        fail_when_called(patch)
        with pytest.raises(RequestError, match="the engine failed: no such caller"):
            null_engine.generate(ask)
        assert not null_engine.get_stats()["initialized"]
        with pytest.raises(EngineClosedError, match=r"no such caller \(initialize\(\) starts it afresh\)"):
            null_engine.generate(ask)
    null_engine.initialize()
    assert len(null_engine.generate(ask).output_tokens) == 2
    assert null_engine.get_stats()["requests"]["accepted"] == 1


def test_a_failed_engine_has_left_no_memory_when_it_starts_again(monkeypatch):
    config = SageLLMConfig(model=ModelConfig(model_id="builtin:pydoc-tiny"), kv_cache={"max_tokens": 512})
    with SageLLMEngine(config) as engine:
        pool = weakref.ref(engine._services.executors[0]._kv)
        with monkeypatch.context() as patch:
            fail_when_called(patch)
            with pytest.raises(RequestError):
                engine.generate(GenerateRequest(prompt="a", max_new_tokens=2))
        load = EngineServices.load
        left = []

        def look_and_load(services):
            left.append(pool())
            load(services)

        monkeypatch.setattr(EngineServices, "load", look_and_load)
        engine.initialize()
    assert left == [None]


def test_gates_that_nobody_would_check_are_refused():
    with pytest.raises(NotAvailableError, match="benchmark.enable_gates"):
        SageLLMEngine(SageLLMConfig(benchmark={"enable_gates": True, "max_ttft_ms": 1}))


def test_after_shutdown_no_thread_and_no_memory_is_left():
    engine = SageLLMEngine(
        SageLLMConfig(model=ModelConfig(model_id="builtin:pydoc-tiny"), kv_cache={"max_tokens": 512})
    )
    before = set(threading.enumerate())
    with engine:
        engine.generate(GenerateRequest(prompt="a", max_new_tokens=2))
        services = weakref.ref(engine._services)
        weights = weakref.ref(engine._services.executors[0]._kv)
    gc.collect()
    assert services() is None
    assert weights() is None
    left = [thread.name for thread in threading.enumerate() if thread not in before]
    assert not [name for name in left if name.startswith("sagellm")]


def test_an_engine_that_could_not_be_built_keeps_no_weights(monkeypatch):
    """Also while somebody keeps the error."""
    loaded = []
    load_model = weights.load_model

    def remember(*arguments):
        model = load_model(*arguments)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(weights, "load_model", remember)
    engine = SageLLMEngine(
        SageLLMConfig(model=ModelConfig(model_id="builtin:pydoc-tiny"), kv_cache={"max_tokens": 10**11})
    )
    with pytest.raises(ConfigError, match="write at most") as kept:
        engine.initialize()
    gc.collect()
    assert loaded[0]() is None
    assert kept.value is not None
