"""Real flows of isage: a configuration, a sink that keeps, sources that end, waiting for a stream."""

from __future__ import annotations

import logging
import threading

import pytest

pytest.importorskip("sage.foundation", reason='needs SAGE: pip install "sagellm[sage]"')

from sage.foundation import CustomLogger, SinkFunction, SourceFunction
from sage.runtime import JobManager, LocalEnvironment, StopSignal

from sageLLM.integrations.sage import channel, engines

NULL = {"model": {"model_id": "builtin:null"}}
TINY = {"model": {"model_id": "builtin:pydoc-tiny"}}  # as the examples and the documents have it: one engine for all
LIMIT_S = 60


class Items(SourceFunction):
    """Gives a list's items one by one, then says that it has no more."""

    def __init__(self, items):
        super().__init__()
        self._items = iter(items)

    def execute(self):
        return next(self._items, StopSignal("items"))


class Keep(SinkFunction):
    """Puts what arrives into a list, and sets an event when there are `count` items."""

    def __init__(self, kept, count=0, is_full=None):
        super().__init__()
        self._kept, self._count, self._is_full = kept, count, is_full

    def execute(self, data):
        self._kept.append(data)
        if len(self._kept) == self._count:
            self._is_full.set()


def steps_of(config):
    """How many steps the worker of a configuration's engine has run."""
    handle = engines.find_handle(config)
    return handle.engine_for(handle).get_stats()["worker"]["steps"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(CustomLogger, "info", lambda *args, **kwargs: None)
    logging.getLogger("sage").setLevel(logging.WARNING)


@pytest.fixture(autouse=True)
def nothing_left():
    """Channels and null models of one test are none of the next one's business; real models stay loaded."""
    yield
    JobManager().cleanup_all_jobs()
    channel._CHANNELS.clear()
    for key, handle in list(engines._HANDLES.items()):
        if handle.config.model.model_id != TINY["model"]["model_id"]:
            handle.shut_down()
            del engines._HANDLES[key]


@pytest.fixture
def env():
    return LocalEnvironment("test")


@pytest.fixture
def stream(env):
    """`stream(build, count)`: submit the flow that `build(kept, sink arguments)` makes and wait for `count` items."""

    def run(build, count):
        kept, is_full = [], threading.Event()
        build(Keep, {"kept": kept, "count": count, "is_full": is_full})
        env.submit()
        assert is_full.wait(LIMIT_S), f"of {count} items there are {len(kept)}: {kept}"
        return kept

    yield run
    if env.env_uuid is not None:
        env.stop()
