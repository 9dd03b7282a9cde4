"""map: a function on every record; what it cannot do becomes a dead letter."""

from __future__ import annotations

from dataclasses import replace

import anyio
import pytest

from sageLLM.errors import ConfigError
from sageLLM.operators.functions import register_function
from sageLLM.operators.map import Map
from sageLLM.records import KVEvent, KVEventKind, Request


@register_function("test_map.in_place")
def in_place(request):
    request.prompt = request.prompt.upper()


@register_function("test_map.new_record")
def new_record(request):
    return replace(request, prompt=request.prompt.upper())


@register_function("test_map.asynchronous")
async def asynchronous(request):
    await anyio.lowlevel.checkpoint()
    return new_record(request)


@register_function("test_map.shout")
def shout(completion):
    choice = replace(completion.choices[0], text="LOUD")
    return replace(completion, choices=[choice], request=Request("another", prompt="p"))


@register_function("test_map.wrong")
def wrong(request):
    return {"prompt": "a dictionary"}


@pytest.mark.parametrize("function", ["in_place", "new_record", "asynchronous"])
def test_each_record_is_replaced_in_order(through, function):
    requests = [Request(str(n), prompt="quiet") for n in range(5)]
    kept, counts = through(Map, {"function": f"test_map.{function}"}, requests)
    assert [record.request_id for record in kept["out"]] == ["0", "1", "2", "3", "4"]
    assert {record.prompt for record in kept["out"]} == {"QUIET"}
    assert kept["out"] == requests, "a request is known by its object: that stays the same"
    assert counts == {"accepted": 5, "done": 5}


def test_a_replaced_completion_stays_the_completion_of_its_request(through, make_completion):
    completion = make_completion("q1")
    kept, counts = through(Map, {"function": "test_map.shout"}, [completion])
    assert kept["out"][0].choices[0].text == "LOUD"
    assert kept["out"][0].request is completion.request
    assert counts == {"accepted": 1, "done": 1}


def test_a_record_for_which_it_raises_is_a_dead_letter_and_the_others_go_on(through):
    requests = [Request("a", prompt="x"), Request("b"), Request("c", prompt="z")]
    kept, counts = through(Map, {"function": "test_map.in_place"}, requests)
    assert [record.prompt for record in kept["out"]] == ["X", "Z"]
    assert kept["error"][0].request is requests[1]
    assert "tested: AttributeError: 'NoneType' object has no attribute 'upper'" in kept["error"][0].error
    assert counts == {"accepted": 3, "done": 2, "error": 1}


def test_a_result_of_another_kind_is_a_dead_letter(through):
    kept, _ = through(Map, {"function": "test_map.wrong"}, [Request("a", prompt="x")])
    assert "'test_map.wrong' returned a dict for a Request" in kept["error"][0].error


def test_a_function_that_is_not_registered():
    with pytest.raises(ConfigError, match=r"no function of that name .* did you mean 'test_map.shout'\?"):
        Map.config_model(function="test_map.shut")


def test_a_name_is_given_once():
    with pytest.raises(ConfigError, match="'test_map.shout' is already registered"):
        register_function("test_map.shout")(lambda record: record)


@register_function("test_map.rename_tenant")
def rename_tenant(event):
    return replace(event, tenant=event.tenant.upper())


def test_a_kv_event_belongs_to_no_request(through):
    event = KVEvent(KVEventKind.STORED, 0, 0.0, tenant="a", block_hashes=["f"])
    kept, counts = through(Map, {"function": "test_map.rename_tenant"}, [event])
    assert [(each.tenant, each.num_blocks) for each in kept["out"]] == [("A", 1)]
    assert not counts
