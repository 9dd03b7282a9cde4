"""What the integration counts on in isage: a release that changes one of these fails here first."""

from __future__ import annotations

import threading
from importlib.metadata import version

import pytest
from sage.foundation import (
    BaseFunction,
    FilterFunction,
    FlatMapFunction,
    KeyByFunction,
    MapFunction,
    SinkFunction,
    SourceFunction,
)
from sage.runtime import BaseService, LocalEnvironment, StopSignal

from .conftest import LIMIT_S, Items, Keep

PATHS = ["autostop", "general", "streaming"]


class Watched(BaseFunction):
    """Notes in a list what SAGE does with it."""

    def __init__(self, log, role):
        super().__init__()
        self.log, self.role = log, role
        self.note("made")

    def note(self, what):
        self.log.append((what, self.role, self))

    def open(self):
        self.note("opened")

    def close(self):
        self.note("closed")


class WatchedMap(Watched, MapFunction):
    def execute(self, data):
        self.note(threading.current_thread().name)
        return data


class WatchedSink(Watched, SinkFunction):
    def execute(self, data):
        self.note("ran")


class WatchedSource(Watched, SourceFunction):
    def __init__(self, log, role, count):
        super().__init__(log, role)
        self.left = count

    def execute(self):
        self.left -= 1
        return StopSignal("done") if self.left < 0 else self.left


@pytest.fixture(params=PATHS)
def path(request):
    return request.param


@pytest.fixture
def log_of(env):
    """`log_of(path, count)`: what SAGE did to a source, a map and a sink of a flow of `count` items."""

    def run(path, count=3):
        log = []
        if path == "autostop":
            source = env.from_batch([*range(count)])
        else:
            source = env.from_source(WatchedSource, log, "source", count, delay=0.01)
        source.map(WatchedMap, log, "map").sink(WatchedSink, log, "sink")
        env.submit(autostop=path != "streaming")
        join_sources()
        return log

    return run


def join_sources():
    for thread in threading.enumerate():
        if thread.name.startswith("sage-source-"):
            thread.join(LIMIT_S)
            assert not thread.is_alive()


def count(log, what, role):
    return sum((what, role) == noted[:2] for noted in log)


def test_the_version_is_one_that_we_take():
    assert version("isage").startswith("0.3.")


def test_maps_and_sinks_are_constructed_twice_and_sources_once(log_of, path):
    log = log_of(path)
    assert [count(log, "made", role) for role in ("map", "sink")] == [2, 2]
    assert count(log, "made", "source") == (path != "autostop")


def test_items_reach_one_of_the_two_instances_only(log_of, path):
    ran = {id(noted[2]) for noted in log_of(path) if noted[1] == "map" and noted[0] != "made"}
    assert len(ran) == 1


def test_nothing_is_opened(log_of, path):
    assert not any(what == "opened" for what, *_ in log_of(path))


def test_only_sinks_are_closed_and_only_on_the_general_path(log_of, path):
    closed = [role for what, role, _ in log_of(path) if what == "closed"]
    assert closed == (["sink"] if path == "general" else [])


def test_on_the_autostop_path_eight_threads_run_a_stage_over_all_input(env):
    together, log = threading.Barrier(8), []

    class Wait(MapFunction):
        def execute(self, data):
            together.wait(LIMIT_S)  # breaks unless there are eight at once
            log.append(("map", id(self), data))
            return data

    kept = []

    class Note(SinkFunction):
        def execute(self, data):
            log.append(("sink", threading.current_thread(), data))
            kept.append(data)

    env.from_batch([*range(16)]).map(Wait).sink(Note)
    env.submit(autostop=True)
    assert kept == [*range(16)], "their order is kept"
    assert [what for what, *_ in log] == ["map"] * 16 + ["sink"] * 16, "a stage ends before the next one begins"
    assert len({who for what, who, _ in log if what == "map"}) == 1, "on one instance"
    assert {who for what, who, _ in log if what == "sink"} == {threading.current_thread()}


def test_a_single_batch_source_alone_makes_the_autostop_path(env):
    log = []
    env.from_batch([1]).map(WatchedMap, log, "map").sink(Keep, [])
    env.from_batch([2]).sink(Keep, [])
    env.submit(autostop=True)
    assert [what for what, *_ in log if what != "made"] == [threading.current_thread().name]


def test_streaming_runs_everything_behind_the_sources_under_one_lock(env):
    running, most = [], []

    class Overlap(MapFunction):
        def execute(self, data):
            running.append(data)
            most.append(len(running))
            threading.Event().wait(0.005)  # for the other one to come in
            running.remove(data)
            return data

    for items in ([*range(10)], [*range(10, 20)]):
        env.from_source(Items, items, delay=0.01).map(Overlap).sink(Keep, [])
    env.submit()
    join_sources()
    assert (len(most), max(most)) == (20, 1)


def test_an_exception_ends_a_streaming_source_and_nobody_is_told(env, caplog):
    kept = []

    class Fail(MapFunction):
        def execute(self, data):
            return 1 / data

    env.from_source(Items, [1, 0, 2], delay=0.01).map(Fail).sink(Keep, kept)
    env.submit()
    join_sources()
    assert kept == [1.0]
    status = env.jobmanager.get_job_status(env.env_uuid)
    assert (status["status"], status["success"], status["error"]) == ("stopped", True, None)


@pytest.mark.parametrize("general", [False, True])
def test_with_autostop_an_exception_reaches_who_submits(env, general):
    class Fail(MapFunction):
        def execute(self, data):
            return 1 / data

    source = env.from_source(Items, [0]) if general else env.from_batch([0])
    source.map(Fail).sink(Keep, [])
    with pytest.raises(ZeroDivisionError):
        env.submit(autostop=True)


def test_a_map_never_sees_the_end_and_none_goes_no_further(env):
    seen, kept = [], []

    class See(MapFunction):
        def execute(self, data):
            seen.append(data)
            return None if data == 2 else data

    env.from_source(Items, [1, 2, 3]).map(See).sink(Keep, kept)
    env.submit(autostop=True)
    assert (seen, kept) == ([1, 2, 3], [1, 3])


def test_keyword_arguments_that_sage_takes_for_itself(env):
    class Any_(MapFunction, FilterFunction, FlatMapFunction, KeyByFunction, SinkFunction, SourceFunction):
        def __init__(self, **kwargs):
            super().__init__()

        def execute(self, data=None):
            return data

    source = env.from_source(Any_, name="a", parallelism=1, delay=0.5, ours=1)
    source.map(Any_, name="b", parallelism=2, ours=1)
    source.filter(Any_, name="c", ours=1)
    source.flatmap(Any_, name="d", ours=1)
    source.keyby(Any_, strategy="hash", name="e", ours=1)
    source.sink(Any_, name="f", batch_size=3, parallelism=1, ours=1)
    assert [each.function_kwargs for each in env.pipeline] == [{"ours": 1}] * 6


def test_classes_are_passed_and_functions_but_no_instances(env):
    with pytest.raises(AttributeError):
        env.from_batch([1]).map(WatchedMap([], "map"))
    env.from_batch([1]).map(lambda item: item + 1).sink(Keep, kept := [])
    env.submit(autostop=True)
    assert kept == [2]


def test_services_are_there_but_on_the_autostop_path(path):
    class Echo(BaseService):
        def process(self, data):
            return data.upper()

    class Ask(MapFunction):
        def execute(self, data):
            return self.call_service("echo", data)

    kept = []
    env = LocalEnvironment("services")
    env.register_service("echo", Echo)
    source = env.from_batch(["a"]) if path == "autostop" else env.from_source(Items, ["a"], delay=0.01)
    source.map(Ask).sink(Keep, kept)
    if path == "autostop":
        with pytest.raises(AttributeError, match="call_service"):
            env.submit(autostop=True)
        return
    env.submit(autostop=path == "general")
    join_sources()
    assert kept == ["A"]


def test_a_source_that_says_none_is_asked_again_and_one_that_says_stop_is_not(env):
    kept = []
    env.from_source(Items, [None, 1, None, 2], delay=0.001).sink(Keep, kept)
    env.submit(autostop=True)
    assert kept == [1, 2]
