"""Tokenize, KVLookup, Detokenize: single stages in a flow of isage."""

from __future__ import annotations

import pytest

from sageLLM.integrations.sage import Detokenize, Generate, KVLookup, Tokenize
from sageLLM.integrations.sage.engines import find_handle

from .conftest import NULL, TINY, Items, Keep

THREE = {"max_tokens": 3}


@pytest.fixture(params=["autostop", "general", "streaming"])
def run(request, env, stream):
    """`run(stages, items)`: what comes out of a flow through stages, given as (class, keyword arguments)."""

    def through(stages, items):
        def build(sink, kept):
            autostop = request.param == "autostop"
            flow = env.from_batch(items) if autostop else env.from_source(Items, items, delay=0.01)
            for function, arguments in stages:
                flow = flow.map(function, **arguments)
            flow.sink(sink, **kept)

        if request.param == "streaming":
            return stream(build, len(items))
        kept = []
        build(Keep, {"kept": kept})
        env.submit(autostop=True)
        return kept

    return through


def test_tokenize_puts_the_tokens_in_the_place_of_the_prompt(run):
    assert run([(Tokenize, {"config": NULL})], ["ab", {"prompt": "c", "id": 7}, {"prompt_tokens": [5]}]) == [
        {"prompt_tokens": [97, 98]},
        {"prompt_tokens": [99], "id": 7},
        {"prompt_tokens": [5]},
    ]


def test_tokenize_writes_what_the_chat_template_says(env):
    kept = []
    messages = [{"role": "user", "content": "hi"}]
    env.from_batch([{"messages": messages}]).map(Tokenize, config=TINY).sink(Keep, kept)
    env.submit(autostop=True)
    handle = find_handle(TINY)
    tokenizer = handle.engine_for(handle).services.tokenizer
    assert kept == [{"prompt_tokens": tokenizer.encode_chat(messages)}]


def test_tokenize_and_detokenize_load_no_weights(run):
    stages = [(Tokenize, {"config": NULL}), (lambda item: {"output_tokens": item["prompt_tokens"], "id": 1}, {})]
    assert run([*stages, (Detokenize, {"config": NULL})], ["ab"]) == [{"text": "ab", "id": 1}]
    assert find_handle(NULL)._engine is None


def test_detokenize_takes_a_plain_list(run):
    assert run([(Detokenize, {"config": NULL})], [[104, 105]]) == [{"text": "hi"}]


def test_what_tokenize_made_is_generated_from(run):
    (output,) = run([(Tokenize, {"config": NULL}), (Generate, {"config": NULL, "options": THREE})], [{"prompt": "a"}])
    assert (output["text"], output["context"]) == ("bcd", {"prompt_tokens": [97]})


def test_kv_lookup_tells_what_the_engine_has_cached(env):
    kept, answered = [], []
    prompt = "a prompt that is longer than one block"
    config = {**NULL, "kv_cache": {"max_tokens": 1024, "block_size": 4}}
    env.from_batch([prompt]).map(KVLookup, config=config).map(Generate, config=config, options=THREE).sink(
        Keep, answered
    )
    env.submit(autostop=True)
    assert answered[0]["context"] == {"prompt": prompt, "cached_tokens": 0}
    again = type(env)("again")
    items = [prompt, {"prompt": f"{prompt} and more", "id": 1}, {"prompt": prompt, "options": {"tenant": "another"}}]
    again.from_batch(items).map(KVLookup, config=config).sink(Keep, kept)
    again.submit(autostop=True)
    assert [item["cached_tokens"] for item in kept] == [len(prompt) - 1, len(prompt), 0]  # the last token is computed
    assert kept[1] == {**items[1], "cached_tokens": len(prompt)}


FAILING = [
    (Tokenize, 5, "found 5: write a text"),
    (Tokenize, {"prompt": ""}, "the prompt is empty"),
    (Tokenize, "\ud800", "not valid Unicode"),
    (KVLookup, {"prompt_tokens": [10**6]}, "token id 1000000 is not in the vocabulary"),
    (Detokenize, "text", "found 'text': write"),
    (Detokenize, {"output_tokens": [-1]}, "with ids, or a list of them"),
    (Detokenize, {"output_tokens": ["a"]}, "with ids, or a list of them"),
]


@pytest.mark.parametrize(("stage", "item", "told"), FAILING)
def test_what_fails_is_an_item_with_an_error_and_goes_through_later_stages_as_it_is(env, stage, item, told):
    kept = []
    flow = env.from_batch([item]).map(stage, config=NULL)
    flow.map(Tokenize, config=NULL).map(KVLookup, config=NULL).map(Detokenize, config=NULL).sink(Keep, kept)
    env.submit(autostop=True)
    assert told in kept[0]["error"]
    assert kept[0]["context"] == item
