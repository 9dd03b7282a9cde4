"""SubmitRequests and Completions: a flow in which no stage waits for the device."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sage.runtime import LocalEnvironment, StopSignal

from sageLLM.errors import ConfigError
from sageLLM.integrations.sage import END, Completions, SubmitRequests
from sageLLM.integrations.sage.channel import find_channel
from sageLLM.integrations.sage.engines import find_handle

from .conftest import LIMIT_S, NULL, TINY, Items, Keep, steps_of

THREE = {"max_tokens": 3}
QUESTIONS = [{"prompt": f"question {n}", "id": n} for n in range(16)]


def ids_of(outputs):
    return sorted(output["context"]["id"] for output in outputs)


def test_sixteen_items_of_a_stream_are_one_batch_on_the_device(env, stream):
    """Where a blocking map takes 16 times as many steps (test_sage_generate.py)."""
    before = steps_of(TINY)
    options = {"max_tokens": 32, "ignore_eos": True}

    def build(sink, kept):
        env.from_source(Items, QUESTIONS, delay=0.01).sink(SubmitRequests, config=TINY, options=options)
        env.from_source(Completions, config=TINY, delay=0.01).sink(sink, **kept)

    outputs = stream(build, 16)
    assert ids_of(outputs) == [*range(16)]
    assert {output["usage"]["completion_tokens"] for output in outputs} == {32}
    assert 32 <= steps_of(TINY) - before < 2 * 32


@pytest.mark.parametrize("completions_first", [False, True])
def test_so_are_they_on_the_general_path_which_ends_with_the_last_one(env, completions_first):
    before, kept = steps_of(TINY), []
    options = {"max_tokens": 32, "ignore_eos": True}
    for is_completions in (completions_first, not completions_first):
        if is_completions:
            env.from_source(Completions, config=TINY).sink(Keep, kept)
        else:
            env.from_batch([*QUESTIONS, END]).sink(SubmitRequests, config=TINY, options=options)
    env.submit(autostop=True)
    assert ids_of(kept) == [*range(16)]
    assert steps_of(TINY) - before < 2 * 32


def test_a_flow_may_submit_on_the_autostop_path_and_another_one_read():
    first, second, kept = LocalEnvironment("first"), LocalEnvironment("second"), []
    first.from_batch([*QUESTIONS, END]).sink(SubmitRequests, config=NULL, options=THREE)
    first.submit(autostop=True)
    second.from_source(Completions, config=NULL).sink(Keep, kept)
    second.submit(autostop=True)
    assert ids_of(kept) == [*range(16)]


def test_end_ends_the_stream_and_the_engine(env, stream):
    def build(sink, kept):
        env.from_source(Items, ["a", "hi", END], delay=0.01).sink(SubmitRequests, config=NULL, options=THREE)
        env.from_source(Completions, config=NULL, delay=0.01).sink(sink, **kept)

    assert sorted(output["text"] for output in stream(build, 2)) == ["bcd", "cde"]
    for thread in threading.enumerate():
        if thread.name.startswith("sage-source-"):
            thread.join(LIMIT_S)
    assert env.jobmanager.get_job_status(env.env_uuid)["running"] is False
    assert find_handle(NULL)._engine is None


def test_end_alone_ends_a_stream_too(env):
    env.from_source(Items, [END], delay=0.01).sink(SubmitRequests, config=NULL)
    env.from_source(Completions, config=NULL, delay=0.01).sink(Keep, [])
    env.submit(autostop=True)


def test_the_same_flow_may_run_again(env):
    for _ in range(2):
        kept, again = [], LocalEnvironment("again")
        again.from_source(Completions, config=NULL).sink(Keep, kept)
        again.from_batch([*QUESTIONS, END]).sink(SubmitRequests, config=NULL, options=THREE)
        again.submit(autostop=True)
        assert ids_of(kept) == [*range(16)]


def test_what_comes_after_end_is_of_another_flow():
    submit = SubmitRequests(config=NULL, options=THREE)
    for text in ("bcd", "cde"):
        submit.execute("a" if text == "bcd" else "hi")
        submit.execute(END)
        complete = Completions(config=NULL)
        assert complete.execute()["text"] == text
        assert isinstance(complete.execute(), StopSignal)


def test_what_fails_comes_out_with_an_error_and_the_stream_goes_on(env, stream):
    failed = {"error": "by a stage before", "context": 0}

    def build(sink, kept):
        items = ["a", 5, {"prompt": ""}, failed, "hi"]
        env.from_source(Items, items, delay=0.01).sink(SubmitRequests, config=NULL, options=THREE)
        env.from_source(Completions, config=NULL, delay=0.01).sink(sink, **kept)

    outputs = stream(build, 5)
    assert sorted(output["text"] for output in outputs if "error" not in output) == ["bcd", "cde"]
    assert failed in outputs
    told = " ".join(output["error"] for output in outputs if "error" in output)
    assert "found 5: write a text" in told
    assert "the prompt is empty" in told


def test_channels_keep_flows_with_one_engine_apart(env):
    kept = {"x": [], "y": []}
    for name, items in (("x", ["a", END]), ("y", ["hi", END])):
        env.from_batch(items).sink(SubmitRequests, config=NULL, options=THREE, channel=name)
        env.from_source(Completions, config=NULL, channel=name).sink(Keep, kept[name])
    env.submit(autostop=True)
    assert {name: [output["text"] for output in outputs] for name, outputs in kept.items()} == {
        "x": ["bcd"], "y": ["cde"]
    }  # fmt: skip


def test_what_a_stopped_stream_has_not_given_the_next_one_gives(env, stream):
    SubmitRequests(config=NULL, options=THREE).execute("a")  # and whoever would read it is stopped

    def build(sink, kept):
        env.from_source(Completions, config=NULL, delay=0.01).sink(sink, **kept)

    assert stream(build, 1)[0]["text"] == "bcd"


def test_who_still_submits_when_another_flow_has_ended_the_channel_gets_the_next_one():
    ends, goes_on = (SubmitRequests(config=NULL, options=THREE) for _ in range(2))
    complete = Completions(config=NULL)
    for submit in (ends, goes_on):
        submit.execute("a")
    ends.execute(END)
    assert [complete.execute()["text"] for _ in range(2)] == ["bcd", "bcd"]
    assert isinstance(complete.execute(), StopSignal)  # before `goes_on` has more
    goes_on.execute("hi")
    goes_on.execute(END)
    complete = Completions(config=NULL)
    assert complete.execute()["text"] == "cde"
    assert isinstance(complete.execute(), StopSignal)


def test_the_end_is_told_also_when_an_item_waits_for_its_turn():
    submit = SubmitRequests(config=NULL, options=THREE, max_in_flight=1)
    channel = find_channel(find_handle(NULL), "")
    submit.execute("a")
    with channel._changed:
        channel._in_flight += 1  # as if one more were computed, for long
    with ThreadPoolExecutor() as threads:
        waits = threads.submit(submit.execute, "a")
        while not channel._waiting:
            time.sleep(0.001)
        channel.end()
        with channel._changed:
            channel._in_flight -= 1
            channel._changed.notify_all()
        waits.result()
    complete = Completions(config=NULL)
    assert [complete.execute()["text"] for _ in range(2)] == ["bcd", "bcd"]
    assert isinstance(complete.execute(), StopSignal)


def test_flows_that_end_the_channel_while_others_submit_lose_nothing():
    flows, each = 4, 30

    def submit(flow):
        for n in range(each):
            sink = SubmitRequests(config=NULL, options=THREE)
            sink.execute({"prompt": "a", "id": flow * each + n})
            sink.execute(END)

    outputs = []
    with ThreadPoolExecutor(flows) as threads:
        working = [threads.submit(submit, flow) for flow in range(flows)]
        while len(outputs) < flows * each:
            output = Completions(config=NULL).execute()
            if isinstance(output, dict):
                outputs.append(output)
    assert all(done.result() is None for done in working)
    assert ids_of(outputs) == [*range(flows * each)]


def test_no_more_than_max_in_flight_are_computed_at_once():
    submit = SubmitRequests(config=NULL, options=THREE, max_in_flight=2)
    handle = find_handle(NULL)
    channel, most = find_channel(handle, ""), []
    engine = handle.engine_for(channel)
    hand_over = engine.submit

    def watch(calls):
        most.append(channel._in_flight)
        hand_over(calls)

    engine.submit = watch
    for question in QUESTIONS:
        submit.execute(question)
    submit.execute(END)
    complete = Completions(config=NULL)
    outputs = [complete.execute() for _ in range(17)]
    assert isinstance(outputs.pop(), StopSignal)
    assert ids_of(outputs) == [*range(16)]
    assert max(most) <= 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [({"max_in_flight": 0}, "max_in_flight: found 0"), ({"options": {"n": 0}}, "options: n: found 0")],
)
def test_a_wrong_argument_is_told_to_who_submits_the_flow(env, arguments, told):
    env.from_batch(["a"]).sink(SubmitRequests, config=NULL, **arguments)
    with pytest.raises(ConfigError, match=told):
        env.submit()


item = st.one_of(
    st.text(min_size=1, max_size=5), st.integers(), st.builds(lambda text: {"prompt": text}, st.text(max_size=5))
)


@settings(max_examples=15, deadline=None)
@given(st.lists(item, max_size=20), st.integers(1, 5))
def test_one_output_for_each_item_whatever_it_is(items, max_in_flight):
    handle = find_handle(NULL)
    handle.engine_for(handle)  # which keeps it from one example to the next
    submit = SubmitRequests(config=NULL, options=THREE, channel="any", max_in_flight=max_in_flight)
    for each in [*items, END]:
        submit.execute(each)
    complete, contexts = Completions(config=NULL, channel="any"), []
    while not isinstance(output := complete.execute(), StopSignal):
        contexts.append(repr(output["context"]))
    assert sorted(contexts) == sorted(map(repr, items))
