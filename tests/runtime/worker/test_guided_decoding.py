"""Outputs that are guided: they conform, whatever else a request asks for, and disturb nobody."""

from __future__ import annotations

import json
import re
import shutil
import threading
from functools import partial
from itertools import count

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models

from sageLLM.backends import detect_backend
from sageLLM.config import BackendConfig, ModelConfig
from sageLLM.models.guide_compiler import GuideCompiler
from sageLLM.models.resolve import resolve_model
from sageLLM.models.tokenizer import load_tokenizer
from sageLLM.models.weights import load_model
from sageLLM.records import FinishReason, Guide, GuideKind, SamplingParams
from sageLLM.runtime.worker.guided_rows import GuidedRows
from sageLLM.runtime.worker.sampling import SamplingState
from sageLLM.runtime.worker.stop_strings import StopStringMatcher
from sageLLM.runtime.worker.token_mask import TokenMask
from sageLLM.runtime.worker.torch_executor import TorchExecutor

EOS = (1,)
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


class GuidedModel:
    """A model on one CPU thread, and what its tokens are to a grammar."""

    def __init__(self, model_id, **fields):
        resolved = resolve_model(ModelConfig(model_id=str(model_id), **fields))
        self.backend = detect_backend(BackendConfig(backend_type="cpu", threads=1))
        self.loaded = load_model(resolved, self.backend)
        self.tokenizer = load_tokenizer(resolved)
        self.guides = GuideCompiler(resolved, lambda: self.tokenizer)

    def bench(self, bench, **options):
        executor = TorchExecutor(self.loaded, self.backend, 256, 4, 8, guides=self.guides)
        return bench(blocks=256, executor=executor, max_batch_size=8, **options)

    def run(self, bench, *asks, **options):
        """A sequence for each (guide, its sampling), computed together."""
        b = self.bench(bench, **options)
        sequences = [
            b.sequence([5, 6, 7 + n], guide=guide, **{"max_new_tokens": 60, "temperature": 1.0, "eos": EOS, **sampling})
            for n, (guide, sampling) in enumerate(asks)
        ]
        b.offer(*sequences)
        b.run()
        b.close()
        b.check_nothing_leaks()
        return sequences

    def text(self, choice):
        return self.tokenizer.decode(choice.output_tokens)


@pytest.fixture(scope="module")
def model(checkpoint_folder):
    return GuidedModel(checkpoint_folder("qwen3"))


@pytest.fixture(scope="module")
def byte_fallback_model(checkpoint_folder, tmp_path_factory):
    """Llama 2's kind of tokenizer: pieces with a space mark, bytes as a fallback. The model has more ids than it."""
    folder = tmp_path_factory.mktemp("pieces") / "model"
    shutil.copytree(checkpoint_folder("llama2"), folder)
    pieces = ["<unk>", "</s>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", '"', "{", "▁{", "}"]
    vocab = {piece: token for token, piece in enumerate(pieces)}
    rust = RustTokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    rust.add_special_tokens(pieces[:3])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    rust.decoder = decoders.Sequence(steps)
    rust.save(str(folder / "tokenizer.json"))
    return GuidedModel(folder)


def regex(source):
    return Guide(GuideKind.REGEX, source)


def lark(source):
    return Guide(GuideKind.GRAMMAR, source)


def schema_guide(schema):
    return Guide(GuideKind.JSON_SCHEMA, json.dumps({**schema, "x-guidance": {"whitespace_flexible": False}}))


SCALARS = st.sampled_from([
    {"type": "boolean"}, {"type": "null"}, {"enum": ["red", "green", 3]}, {"const": {"a": [1]}},
    {"type": "integer", "minimum": -5, "maximum": 120}, {"type": "string", "maxLength": 4},
    {"type": "string", "pattern": "^[a-f]{2,3}$"},
])  # fmt: skip


def containers(inner):
    objects = st.dictionaries(st.sampled_from(["n", "name", "ä"]), inner, max_size=2).map(
        lambda fields: {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}
    )
    return objects | inner.map(lambda items: {"type": "array", "items": items, "maxItems": 2})


SCHEMAS = st.recursive(SCALARS, containers, max_leaves=3)


def conforms(value, schema):
    if "enum" in schema or "const" in schema:
        return value in schema.get("enum", [schema.get("const")])
    kind = {"boolean": bool, "null": type(None), "integer": int, "string": str, "object": dict, "array": list}
    if type(value) is not kind[schema["type"]]:
        return False
    if schema["type"] == "object":
        return {*value} == {*schema["required"]} and all(
            conforms(value[name], part) for name, part in schema["properties"].items()
        )
    if schema["type"] == "array":
        return len(value) <= 2 and all(conforms(item, schema["items"]) for item in value)
    if schema["type"] == "integer":
        return -5 <= value <= 120
    if schema["type"] == "string":
        return len(value) <= 4 and re.search(schema.get("pattern", ""), value) is not None
    return True


@pytest.mark.parametrize("name", ["model", "byte_fallback_model"])
def test_what_ends_by_itself_parses_and_conforms_to_its_schema(bench, request, name):
    guided = request.getfixturevalue(name)

    @settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(st.tuples(SCHEMAS, st.integers(0, 2**32)), min_size=1, max_size=4), st.sampled_from([0, 5]))
    def check(asks, top_k):
        sampling = {"n": 2, "max_new_tokens": 150, "top_k": top_k}
        asked = [(schema_guide(schema), {"seed": seed, **sampling}) for schema, seed in asks]
        for sequence, (schema, _) in zip(guided.run(bench, *asked), asks, strict=True):
            assert sequence.error is None
            for choice in sequence.choices:
                assert choice.finish_reason is STOP
                assert conforms(json.loads(guided.text(choice)), schema)

    check()


def test_a_cut_output_is_the_beginning_of_one_that_conforms(bench, model):
    guide = schema_guide({"type": "array", "minItems": 30})
    (sequence,) = model.run(bench, (guide, {"max_new_tokens": 20, "n": 4, "seed": 3}))
    for choice in sequence.choices:
        assert choice.finish_reason is LENGTH
        assert model.guides.new_matcher(guide).consume_tokens(choice.output_tokens)


def test_the_end_comes_with_the_last_token_that_may_follow_or_by_end_of_sequence(bench, model):
    fixed, open_ended = model.run(bench, (regex("[0-9]{3}"), {"seed": 1}), (regex("[ab]{1,40}"), {"seed": 5}))
    (choice,) = fixed.choices
    assert (choice.finish_reason, choice.stop_matched, choice.conforms) == (STOP, None, True)
    assert re.fullmatch("[0-9]{3}", model.text(choice))
    assert not {*EOS} & {*choice.output_tokens}
    (choice,) = open_ended.choices
    assert (choice.finish_reason, choice.stop_matched, choice.output_tokens[-1]) == (STOP, 1, 1)
    assert re.fullmatch("[ab]{1,39}", model.text(choice))


@pytest.mark.parametrize("asks", [{"ignore_eos": True, "eos": ()}, {"min_tokens": 30}])
def test_where_no_end_is_wanted_the_output_goes_on_as_long_as_its_grammar_allows(bench, model, asks):
    """But not longer: what conforms wins over min_tokens."""
    sampling = {"max_new_tokens": 30, "seed": 2, **asks}
    endless, short = model.run(bench, (regex("[ab]*"), sampling), (regex("[0-9]{2,7}"), sampling))
    assert len(endless.choices[0].output_tokens) == 30
    assert re.fullmatch("[0-9]{7}", model.text(short.choices[0]))
    assert short.choices[0].finish_reason is STOP


def test_a_stop_string_cuts_and_a_stop_token_ends_where_the_grammar_allows_it(bench, model):
    comma = model.tokenizer.encode(",")
    by_string, by_token, never = model.run(
        bench,
        (regex("[0-9]{4}, [0-9]{4}"), {"stop": (",",)}),
        (regex("[0-9]{4},[0-9]{4}"), {"stop_token_ids": tuple(comma)}),
        (regex("[0-9]{8}"), {"stop_token_ids": tuple(comma)}),
        stop_matcher=lambda sequence: StopStringMatcher(model.tokenizer.stream(), sequence.sampling.stop),
    )
    assert by_string.choices[0].stop_matched == ","
    assert by_token.choices[0].stop_matched == comma[0]
    assert re.fullmatch("[0-9]{8}", model.text(never.choices[0]))


def test_a_stop_token_before_min_tokens_is_chosen_only_where_nothing_else_conforms(bench, model):
    (one,) = model.tokenizer.encode("1")
    sampling = {"stop_token_ids": (one,), "min_tokens": 4, "seed": 4}
    forced, free = model.run(bench, (regex("1111"), sampling), (regex("[12]{4}"), sampling))
    assert forced.choices[0].output_tokens == [one]  # and it ends, as it would have later
    assert "1" not in model.text(free.choices[0])[:3]


def test_bias_and_penalties_choose_among_what_conforms(bench, model):
    yes, no = (model.tokenizer.encode(word)[0] for word in ("yes", "no"))
    guide = regex("yes|no")
    biased, opposed, repeated = model.run(
        bench,
        (guide, {"logit_bias": {yes: 50.0}}),
        (guide, {"logit_bias": {no: 50.0, 200: 90.0}}),
        (regex("a{6}"), {"repetition_penalty": 9.0, "frequency_penalty": 2.0, "presence_penalty": 2.0}),
    )
    assert [model.text(s.choices[0]) for s in (biased, opposed, repeated)] == ["yes", "no", "aaaaaa"]


def test_logprobs_are_the_models_own_not_those_among_what_conforms(bench, model):
    (sequence,) = model.run(bench, (regex("[0-9]{5}"), {"logprobs": 3, "temperature": 0.0}))
    told = sequence.choices[0].logprobs
    assert [each.token for each in told] == sequence.choices[0].output_tokens
    assert any(each.logprob < each.top[0][1] for each in told)  # the model would rather have said something else


def test_who_is_not_guided_is_not_disturbed(bench, model):
    plain = {"temperature": 0.7, "seed": 9, "max_new_tokens": 25, "eos": ()}
    alone = model.run(bench, (None, plain))[0].choices[0].output_tokens
    others = [(regex("[0-9]{9}"), {"seed": n}) for n in range(3)]
    assert model.run(bench, (None, plain), *others)[0].choices[0].output_tokens == alone


def test_a_slot_that_was_guided_is_free_for_who_is_not(bench, model):
    b = model.bench(bench)
    outputs = []
    for guide in (None, regex("[0-9]{30}"), None):
        sequence = b.sequence([5, 6], max_new_tokens=30, guide=guide, eos=())
        b.offer(sequence)
        b.run()
        outputs.append(sequence.choices[0].output_tokens)
    b.close()
    assert outputs[0] == outputs[2] != outputs[1]


def test_a_row_that_cannot_go_on_ends_with_an_error_and_takes_nobody_with_it(bench, monkeypatch):
    """A model whose 64 tokens are bytes has digits and no letters."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_size": 16, "vocab_size": 64, "max_seq_len": 128}
    digits = GuidedModel("nobody/nothing", **sizes)
    lost, fine = digits.run(bench, (regex("[0-9]{2}[a-z]"), {"n": 2, "eos": ()}), (regex("[0-9]{6}"), {"eos": ()}))
    assert lost.error == (
        "the output cannot be guided any further: the model has no token with which the output could go on"
    )
    assert [len(choice.output_tokens) for choice in lost.choices] == [1, 1]
    assert fine.error is None
    assert re.fullmatch("[0-9]{6}", digits.text(fine.choices[0]))


def test_a_grammar_that_the_executor_cannot_compile_ends_its_row_alone(bench, model):
    bad, fine = model.run(bench, (regex("a("), {}), (regex("[0-9]{6}"), {}))
    assert "the output cannot be guided any further: guided_regex: invalid regex" in bad.error
    assert re.fullmatch("[0-9]{6}", model.text(fine.choices[0]))


def test_an_ambiguous_grammar_ends_its_own_request_and_changes_nobody_elses_tokens(bench, model):
    hostile = lark('start: "x" e\ne: "a" | ' + " | ".join(["e e"] * 25))
    asks = [(None, {"temperature": 0.7, "seed": 9, "max_new_tokens": 40, "eos": ()}), (regex("[0-9]{38}"), {"seed": 2})]
    alone = model.run(bench, *asks)
    *others, bad = model.run(bench, *asks, (hostile, {"ignore_eos": True, "eos": ()}))
    assert bad.error.startswith("the output cannot be guided any further: ")
    for other, expected in zip(others, alone, strict=True):
        assert other.error is None
        assert other.choices[0].output_tokens == expected.choices[0].output_tokens


@pytest.fixture
def hung_step(monkeypatch):
    """The third step of guided rows does not come back before the test ends."""
    released, calls, step = threading.Event(), count(), GuidedRows._step

    def hang(rows, *given):
        if next(calls) == 2:
            released.wait(60)
        step(rows, *given)

    monkeypatch.setattr(GuidedRows, "_step", hang)
    yield
    released.set()


ASKS = [
    (regex("[0-9]{12}"), {"seed": 1}),
    (lark("start: PAIR+\nPAIR: /[a-z][0-9]/"), {"seed": 2, "max_new_tokens": 20}),
]


def test_a_step_that_takes_too_long_is_given_up_and_its_rows_go_on_from_their_outputs(bench, model, request):
    undisturbed = model.run(bench, *ASKS)
    request.getfixturevalue("hung_step")
    for sequence, expected in zip(model.run(bench, *ASKS), undisturbed, strict=True):
        assert sequence.error is None
        assert sequence.choices[0].output_tokens == expected.choices[0].output_tokens


@pytest.mark.usefixtures("hung_step")
def test_who_made_the_step_slow_ends_then_and_nobody_else(bench, model, monkeypatch):
    match = GuidedRows._match

    def match_slowly(rows, guide, outputs):
        matcher, bits, seconds = match(rows, guide, outputs)
        return matcher, bits, 60.0 if guide == ASKS[1][0] and outputs else seconds

    monkeypatch.setattr(GuidedRows, "_match", match_slowly)
    fine, slow = model.run(bench, *ASKS)
    assert slow.error.startswith("the output cannot be guided any further: it takes too long to find what may follow")
    assert re.fullmatch("[0-9]{12}", model.text(fine.choices[0]))


@pytest.mark.parametrize("options", [{}, {"mode": "strict"}, {"mode": "time_share"}])
@pytest.mark.parametrize("launch_ahead", [True, False])
def test_an_output_of_one_token_ends_with_it_in_every_mode(bench, model, options, launch_ahead):
    make = partial(TorchExecutor, model.loaded, model.backend, 256, 4, 8, guides=model.guides)
    executor = make if options.get("mode") == "strict" else make()
    b = bench(blocks=256, executor=executor, launch_ahead=launch_ahead, **options)
    sequence = b.sequence([5, 6, 7], max_new_tokens=9, guide=regex("[0-9]"), eos=EOS, n=3, temperature=1.0, seed=1)
    b.offer(sequence)
    b.run()
    b.close()
    assert [len(choice.output_tokens) for choice in sequence.choices] == [1, 1, 1]
    assert {choice.finish_reason for choice in sequence.choices} == {STOP}


def test_a_preempted_row_goes_on_where_its_outputs_are(bench, model):
    b = bench(blocks=14, executor=TorchExecutor(model.loaded, model.backend, 14, 4, 8, guides=model.guides))
    guide = lark("start: PAIR+\nPAIR: /[0-9]{2}[a-z]{2}/")
    sequences = [b.sequence([n] * 6, max_new_tokens=28, guide=guide, temperature=1.0, seed=n) for n in range(4, 8)]
    b.offer(*sequences)
    b.run()
    b.close()
    assert b.worker.preemptions > 0
    for sequence in sequences:
        assert re.fullmatch("([0-9]{2}[a-z]{2})*[0-9]{0,2}[a-z]{0,2}", model.text(sequence.choices[0]))


@given(st.data())
def test_a_mask_leaves_a_choice_among_its_tokens_only(data):
    vocab_size = data.draw(st.integers(2, 130))
    rows = data.draw(st.lists(st.sets(st.integers(0, vocab_size - 1), min_size=1), min_size=1, max_size=3))
    at = np.array(data.draw(st.permutations(range(4)))[: len(rows)])
    bits = np.zeros((len(rows), -(-vocab_size // 32) * 32), bool)
    for row, tokens in zip(bits, rows, strict=True):
        row[[*tokens]] = True
    logits = torch.randn(4, vocab_size)
    before = logits.clone()
    mask = TokenMask(at, np.packbits(bits, axis=1, bitorder="little").view(np.int32))
    if data.draw(st.booleans()):
        mask.unpack(vocab_size)
    mask.apply(logits)
    for index, tokens in zip(at, rows, strict=True):
        assert {*np.flatnonzero(torch.isfinite(logits[index]))} == tokens
        before[index] = logits[index]
    assert torch.equal(before, logits)  # the others, and what may be chosen


def test_a_mask_holds_for_every_way_of_drawing():
    state = SamplingState(6, 40, "cpu")
    ways = [{"temperature": 0.0}, {}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 30, "top_p": 0.5}]
    for slot, way in enumerate(ways):
        state.admit(slot, SamplingParams(**{"temperature": 1.0, "seed": slot, **way}), [1], ())
    bits = np.zeros((6, 64), bool)
    bits[:, [3, 38]] = True
    mask = TokenMask(np.arange(6), np.packbits(bits, axis=1, bitorder="little").view(np.int32))
    for step in range(20):
        logits = torch.randn(6, 40)
        logits[:, 3] = logits[:, 38] = -30.0
        assert {*state.sample(logits, np.arange(6), np.full(6, step), mask).tokens.tolist()} <= {3, 38}
