"""tokenize: requests become sequences, or dead letters that say what to send instead."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest

from sageLLM.config import ModelConfig, SageLLMConfig
from sageLLM.models.resolve import resolve_model
from sageLLM.models.tokenizer import Tokenizer, load_tokenizer
from sageLLM.operators.tokenize import Tokenize
from sageLLM.records import Pooling, Request, SamplingParams, SourcePosition


def engine_of(model_id="builtin:null", **fields):
    model = resolve_model(ModelConfig(model_id=str(model_id), **fields))
    return SimpleNamespace(model=model, tokenizer=load_tokenizer(model), config=SageLLMConfig())


@pytest.fixture
def tokenize(drive, make_context):
    def run(requests, engine=None):
        context = make_context()
        object.__setattr__(context, "engine", engine or engine_of())
        return drive(Tokenize, {}, [requests], context)

    return run


def test_text_messages_and_ids_in_one_list_keep_their_order(tokenize, checkpoint_folder):
    engine = engine_of(checkpoint_folder("llama3"))
    messages = [{"role": "user", "content": "What is 你好?"}]
    out = tokenize(
        [Request("a", messages=messages), Request("b", prompt="the fox"), Request("c", prompt_tokens=[5, 6])], engine
    )
    assert [sequence.request_id for sequence in out.sent] == ["a", "b", "c"]
    assert [sequence.prompt_tokens.tolist() for sequence in out.sent] == [
        engine.tokenizer.encode_chat(messages), engine.tokenizer.encode("the fox"), [5, 6]
    ]  # fmt: skip
    assert all(sequence.prompt_tokens.dtype == np.int32 for sequence in out.sent)


def test_a_large_list_is_encoded_off_the_event_loop_with_the_same_result(tokenize):
    out = tokenize([Request(str(index), prompt="x" * 3000) for index in range(20)])
    assert [len(sequence.prompt_tokens) for sequence in out.sent] == [3000] * 20


def test_what_the_request_leaves_open_comes_from_the_generation_config(tokenize, checkpoint_folder):
    engine = engine_of(checkpoint_folder("llama3"))  # do_sample: false
    open_, warm = tokenize(
        [Request("a", prompt="x"), Request("b", prompt="x", sampling=SamplingParams(temperature=0.5, top_k=3))], engine
    ).sent
    assert (open_.sampling.temperature, open_.sampling.top_k, open_.sampling.top_p) == (0.0, 0, 1.0)
    assert (warm.sampling.temperature, warm.sampling.top_k) == (0.5, 3)
    assert open_.eos_token_ids == (1,)


ADD = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ messages[0].content }}", "takes no tools"),
        ("{{ tools }}", "calls written in a form that is not known here"),
        ("{{ tools }}<tool_call>", None),
    ],
)
def test_tools_go_through_the_chat_template(tokenize, checkpoint_folder, template, told):
    engine = engine_of(checkpoint_folder("llama3"))
    engine.tokenizer = Tokenizer(engine.tokenizer._rust, chat_template=template)
    messages = [{"role": "user", "content": "hi"}]
    out = tokenize([Request("a", messages=messages, tools=[ADD])], engine)
    if told is not None:
        assert told in out.letters[0].error
    else:
        text = engine.tokenizer.decode(out.sent[0].prompt_tokens.tolist())
        assert text == "[{'type': 'function', 'function': {'name': 'add'}}]<tool_call>"


def test_without_a_chat_template_there_are_no_tools(tokenize):
    (letter,) = tokenize([Request("a", messages=[{"role": "user", "content": "hi"}], tools=[ADD])]).letters
    assert letter.error == "this model has no chat template that takes tools: leave them out"


@pytest.mark.parametrize("pooling", Pooling)
def test_what_is_embedded_may_fill_the_context_and_samples_nothing(tokenize, pooling):
    engine = engine_of(max_seq_len=10)
    fits, long, samples = (
        Request("a", prompt="0123456789", pooling=pooling),
        Request("b", prompt="0123456789a", pooling=pooling),
        Request("c", prompt="0", pooling=pooling, sampling=SamplingParams(n=2)),
    )
    out = tokenize([fits, long, samples], engine)
    (sequence,) = out.sent
    assert (len(sequence.prompt_tokens), sequence.sampling.max_new_tokens, sequence.eos_token_ids) == (10, 0, ())
    assert "send at most 10" in out.letters[0].error
    assert out.letters[1].error.startswith("found pooling and sampling parameters")


def test_decode_only_without_recomputing_embeds_no_mean(tokenize):
    engine = engine_of()
    engine.config = SageLLMConfig(
        inference_mode="decode_only",
        scheduler={"on_transfer_failure": "fail"},
        kv_cache={"enable_tiering": True, "nvme_tokens": 64, "nvme_path": "kv"},
    )
    out = tokenize([Request("a", prompt="x", pooling=Pooling.MEAN), Request("b", prompt="x", pooling=Pooling.LAST)],
                   engine)  # fmt: skip
    assert [sequence.request_id for sequence in out.sent] == ["b"]
    assert "write pooling last" in out.letters[0].error


def test_ignore_eos_leaves_no_token_to_end_at(tokenize):
    assert tokenize([Request("a", prompt="x", sampling=SamplingParams(ignore_eos=True))]).sent[0].eos_token_ids == ()


def test_the_output_is_cut_to_what_the_context_leaves(tokenize):
    engine = engine_of(max_seq_len=10)
    asked = SamplingParams(max_new_tokens=50, min_tokens=20)
    short, full = tokenize(
        [Request("a", prompt="abc", sampling=asked), Request("b", prompt="123456789", sampling=asked)], engine
    ).sent
    assert (short.sampling.max_new_tokens, full.sampling.max_new_tokens) == (7, 1)
    assert (short.sampling.min_tokens, full.sampling.min_tokens) == (7, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt_tokens": []}, "empty"),
        ({"prompt": "0123456789"}, "send at most 9"),
        ({"prompt_tokens": [1, 259]}, "token id 259 .* 0 to 258"),
        ({"prompt_tokens": [1, -1]}, "token id -1"),
        ({"prompt_tokens": [2**70]}, "flat list of integers|not in the vocabulary"),
        ({"prompt_tokens": [1.5]}, "flat list of integers"),
        ({"prompt_tokens": [[1], [2, 3]]}, "flat list of integers"),
        ({"prompt": "\ud800"}, "not valid Unicode"),
        ({"messages": [{"role": "user"}]}, "`content`"),
        ({"prompt": "x", "sampling": SamplingParams(top_p=2.0)}, "top_p is 2.0"),
        ({"prompt": "x", "sampling": SamplingParams(max_new_tokens=0)}, "max_new_tokens is 0"),
    ],
)
def test_a_bad_request_is_a_dead_letter_and_its_neighbours_go_on(fields, message, tokenize):
    src = SourcePosition("in.jsonl", 2, 9, "f")
    requests = [Request("good", prompt="ok"), Request("bad", src=src, **fields), Request("also", prompt="fine")]
    out = tokenize(requests, engine_of(max_seq_len=10))
    assert [sequence.request_id for sequence in out.sent] == ["good", "also"]
    (letter,) = out.letters
    assert (letter.request_id, letter.src) == ("bad", src)
    assert re.search(message, letter.error)
