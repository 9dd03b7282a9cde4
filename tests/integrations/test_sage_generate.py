"""Generate, GenerateBatch, LLMService: in real flows of isage, on each of its paths."""

from __future__ import annotations

import pytest
from sage.foundation import MapFunction
from sage.runtime import FlowNetEnvironment

from sageLLM.errors import ConfigError
from sageLLM.integrations.sage import Generate, GenerateBatch, LLMService
from sageLLM.integrations.sage.engines import find_handle

from .conftest import NULL, TINY, Items, Keep, steps_of

PROMPTS = ["a", "hi", {"prompt": "hi", "id": 7}]
ANSWERS = ["bcd", "cde", "cde"]  # the null model counts on from the length of the prompt
THREE = {"max_tokens": 3}


def source_of(env, path, items):
    return env.from_batch(items) if path == "autostop" else env.from_source(Items, items, delay=0.01)


@pytest.mark.parametrize("path", ["autostop", "general"])
def test_each_item_becomes_its_output_in_order(env, path):
    kept = []
    source_of(env, path, PROMPTS).map(Generate, config=NULL, options=THREE).sink(Keep, kept)
    env.submit(autostop=True)
    assert [output["text"] for output in kept] == ANSWERS
    assert kept[1] == {
        "text": "cde",
        "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
        "finish_reason": "length",
        "context": "hi",
    }
    assert kept[2]["context"] == {"prompt": "hi", "id": 7}, "the context is the item as it came"


def test_so_it_does_in_a_stream(stream, env):
    def build(sink, kept):
        env.from_source(Items, PROMPTS, delay=0.01).map(Generate, config=NULL, options=THREE).sink(sink, **kept)

    assert [output["text"] for output in stream(build, 3)] == ANSWERS


def test_and_with_flownet(env):
    env, kept = FlowNetEnvironment("test"), []
    env.from_batch(PROMPTS).map(Generate, config=NULL, options=THREE).sink(Keep, kept)
    env.submit(autostop=True)
    assert [output["text"] for output in kept] == ANSWERS


def test_an_items_own_options_come_before_the_stages(env):
    kept = []
    items = ["a", {"prompt": "a", "options": {"max_new_tokens": 5}}, {"prompt": "a", "options": {"n": 2}}]
    env.from_batch(items).map(Generate, config=NULL, options=THREE).sink(Keep, kept)
    env.submit(autostop=True)
    assert [output["text"] for output in kept] == ["bcd", "bcdef", "bcd"]
    assert [choice["text"] for choice in kept[2]["choices"]] == ["bcd", "bcd"]


def test_messages_go_through_the_chat_template(env):
    kept = []
    question = {"messages": [{"role": "user", "content": "What does heapq.heappush do?"}]}
    env.from_batch([question]).map(Generate, config=TINY, options={"temperature": 0}).sink(Keep, kept)
    env.submit(autostop=True)
    assert kept[0]["text"] == "Push item onto heap, maintaining the heap invariant."
    assert kept[0]["finish_reason"] == "stop"


def test_an_embedding_has_a_vector_for_a_text(env):
    kept = []
    env.from_batch(["a"]).map(Generate, config=TINY, options={"pooling": "mean"}).sink(Keep, kept)
    env.submit(autostop=True)
    assert kept[0].keys() == {"embedding", "usage", "finish_reason", "context"}
    assert all(isinstance(number, float) for number in kept[0]["embedding"])


def test_tools_give_tool_calls(env):
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
    kept, options = [], {"tools": [tool], **THREE}
    item = {"messages": [{"role": "user", "content": "hi"}]}
    env.from_batch([item, "a"]).map(Generate, config=NULL, options=options).sink(Keep, kept)
    env.submit(autostop=True)
    assert "tool_calls" in kept[0] or "tools" in kept[0]["error"], "a model without a form for calls says so"
    assert "found tools without messages" in kept[1]["error"]


FAILING = [
    (5, "found 5: write a text, or a dictionary"),
    ({"promt": "a"}, "found 'promt': an item needs one of prompt, messages, prompt_tokens"),
    ({"prompt": "a", "max_tokens": 3}, "found 'max_tokens' beside the prompt: write it as a field of 'options'"),
    ({"prompt": "a", "options": 3}, "options: found 3, write a dictionary"),
    ({"prompt": "a", "options": {"prompt": "b"}}, "options.prompt: write it beside 'options'"),
    ({"prompt": "a", "options": {"stream": True}}, "options.stream: items of a SAGE flow come whole"),
    ({"prompt": "a", "options": {"top_p": 7}}, "top_p: found 7"),
    ({"prompt": "a", "options": {"temprature": 0}}, "did you mean 'temperature'?"),
    ({"prompt": "a", "messages": []}, "messages: found []"),
    ({"prompt": ""}, "the prompt is empty"),
]


@pytest.mark.parametrize(("item", "told"), FAILING, ids=[told for _, told in FAILING])
def test_what_fails_is_an_output_with_an_error_and_the_others_go_on(env, item, told):
    kept = []
    env.from_source(Items, ["a", item, "hi"]).map(Generate, config=NULL, options=THREE).sink(Keep, kept)
    env.submit(autostop=True)
    good, bad, also_good = kept
    assert (good["text"], also_good["text"]) == ("bcd", "cde")
    assert told in bad.pop("error")
    assert bad == {"text": "", "usage": dict.fromkeys(good["usage"], 0), "finish_reason": "error", "context": item}


def test_what_has_failed_goes_through_as_it_is(env):
    kept = []
    env.from_batch([5]).map(Generate, config=NULL).map(Generate, config=NULL).sink(Keep, kept)
    env.submit(autostop=True)
    assert kept[0]["context"] == 5


def test_generate_batch_takes_lists(env):
    kept = []
    env.from_batch(["a", [], ["a", 5]]).map(GenerateBatch, config=NULL, options=THREE).sink(Keep, kept)
    env.submit(autostop=True)
    (alone,), nothing, (good, bad) = kept
    assert "GenerateBatch takes lists of items; for one, use Generate" in alone["error"]
    assert nothing == []
    assert (good["text"], "found 5" in bad["error"]) == ("bcd", True)


def test_a_model_that_cannot_be_had_is_an_error_of_each_item(env, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    kept = []
    env.from_batch(["a", "b"]).map(Generate, config={"model": {"model_id": "no/such-model"}}).sink(Keep, kept)
    env.submit(autostop=True)
    assert ["no/such-model" in output["error"] for output in kept] == [True, True]


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"config": {"modell": {}}}, ConfigError, "modell"),
        ({"config": 5}, ConfigError, "config: found 5"),
        ({"options": {"max_tokens": 0}}, ConfigError, "options: max_tokens: found 0"),
        ({"options": {"stream": True}}, ConfigError, "options: options.stream"),
        ({"opions": {}}, TypeError, "opions"),
    ],
)
def test_a_wrong_argument_is_told_to_who_submits_the_flow(env, arguments, error, told):
    env.from_batch(["a"]).map(Generate, **arguments).sink(Keep, [])
    with pytest.raises(error, match=told):
        env.submit()


def test_sixteen_items_of_a_list_are_one_batch_on_the_device(env):
    """A batch of 16 takes as many steps as the longest output has tokens, and few more; one by one it would be 512."""
    kept, before = [], steps_of(TINY)
    options = {"max_tokens": 32, "ignore_eos": True}
    env.from_batch([[f"question {n}" for n in range(16)]]).map(GenerateBatch, config=TINY, options=options).sink(
        Keep, kept
    )
    env.submit(autostop=True)
    assert [output["usage"]["completion_tokens"] for output in kept[0]] == [32] * 16
    assert 32 <= steps_of(TINY) - before < 2 * 32


def test_the_eight_threads_of_the_autostop_path_are_batches_of_eight(env):
    kept, before = [], steps_of(TINY)
    options = {"max_tokens": 32, "ignore_eos": True}
    env.from_batch([f"question {n}" for n in range(16)]).map(Generate, config=TINY, options=options).sink(Keep, kept)
    env.submit(autostop=True)
    assert len(kept) == 16
    assert 2 * 32 <= steps_of(TINY) - before < 4 * 32


def test_on_the_streaming_path_a_blocking_map_is_a_batch_of_one(env, stream):
    before = steps_of(TINY)
    options = {"max_tokens": 8, "ignore_eos": True}

    def build(sink, kept):
        source = env.from_source(Items, [f"question {n}" for n in range(16)], delay=0.01)
        source.map(Generate, config=TINY, options=options).sink(sink, **kept)

    stream(build, 16)
    assert steps_of(TINY) - before >= 16 * 8


class Ask(MapFunction):
    def execute(self, data):
        return self.call_service("llm", data)


def test_a_service_answers_functions_of_the_flow(env):
    kept = []
    env.register_service("llm", LLMService, config=NULL, options=THREE)
    env.from_source(Items, ["a", ["hi", 5]]).map(Ask).sink(Keep, kept)
    env.submit(autostop=True)
    (another, bad), one = sorted(kept, key=len)  # while a call waits, SAGE begins with the next item
    assert (one["text"], another["text"]) == ("bcd", "cde")
    assert "found 5" in bad["error"]


def test_calls_of_a_service_are_one_batch(env):
    class AskForAll(MapFunction):
        def execute(self, data):
            asked = [self.call_service_async("llm", f"{data} {n}") for n in range(4)]
            return [each.result(60) for each in asked]

    kept = []
    before = steps_of(TINY)
    env.register_service("llm", LLMService, config=TINY, options={"max_tokens": 32, "ignore_eos": True})
    env.from_source(Items, ["question"]).map(AskForAll).sink(Keep, kept)
    env.submit(autostop=True)
    assert len(kept[0]) == 4
    assert steps_of(TINY) - before < 2 * 32


class TestTheEngine:
    def test_nothing_is_loaded_before_the_first_item(self, env):
        env.from_batch([]).map(Generate, config=NULL).sink(Keep, [])
        env.submit(autostop=True)
        assert find_handle(NULL)._engine is None

    def test_equal_configurations_share_one(self, env):
        kept = []
        flow = env.from_batch(["a", "b"]).map(Generate, config=NULL, options=THREE).map(lambda done: done["text"])
        flow.map(Generate, config=NULL, options=THREE).sink(Keep, kept)
        env.submit(autostop=True)
        handle = find_handle(NULL)
        assert handle.engine_for(handle).get_stats()["requests"]["done"] == 4

    def test_its_last_user_ends_it(self):
        first, second = Generate(config=NULL, options=THREE), Generate(config=NULL, options=THREE)
        assert [each.execute("a")["text"] for each in (first, second)] == ["bcd", "bcd"]
        engine = find_handle(NULL)._engine
        first.close()
        assert engine.get_stats()["initialized"]
        second.close()
        assert not engine.get_stats()["initialized"]
        assert second.execute("a")["text"] == "bcd", "another one is built when it is needed"

    def test_a_user_that_is_gone_does_not_count(self):
        first, second = Generate(config=NULL, options=THREE), Generate(config=NULL, options=THREE)
        assert [each.execute("a")["text"] for each in (first, second)] == ["bcd", "bcd"]
        engine = find_handle(NULL)._engine
        del first
        second.close()
        assert not engine.get_stats()["initialized"]

    def test_a_service_lets_go_of_it_when_the_flow_is_over(self, env):
        env.register_service("llm", LLMService, config=NULL, options=THREE)
        env.from_source(Items, ["a"]).map(Ask).sink(Keep, [])
        env.submit(autostop=True)
        assert find_handle(NULL)._engine is None

    def test_a_failed_one_is_built_anew(self, monkeypatch):
        generate = Generate(config=NULL, options=THREE)
        assert generate.execute("a")["text"] == "bcd"
        from sageLLM.operators.detokenize import Detokenize

        async def fail(self, records, out):
            raise RuntimeError("the test says so")

        with monkeypatch.context() as patch:
            patch.setattr(Detokenize, "process", fail)
            told = [generate.execute("a")["error"] for _ in range(8)]  # by then it may not be restarted any more
            assert all("the test says so" in each for each in told), told
        assert generate.execute("a")["text"] == "bcd"
