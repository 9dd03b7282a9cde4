"""detokenize: deltas get text that is certain, finished sequences become completions with their times."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sageLLM.models.tokenizer import NullTokenizer, Tokenizer
from sageLLM.operators.detokenize import Detokenize
from sageLLM.records import (
    Choice,
    Completion,
    FinishReason,
    Request,
    SamplingParams,
    Sequence,
    Timings,
    TokenDelta,
    ToolChoice,
)
from sageLLM.runtime.worker.stop_strings import StopStringMatcher


def sequence_of(*, stream=True, timings=None, eos=(257,), **sampling) -> Sequence:
    request = Request("q", prompt="x", stream=stream, arrival=10.0)
    return Sequence(request, np.zeros(3, np.int32), SamplingParams(**sampling), eos, timings=timings or Timings())


def decode_as_the_worker_does(sequence, tokens, tokenizer):
    """A choice that ends at the first end-of-sequence token or stop string, and the lengths it had on the way."""
    sampling = sequence.sampling
    matcher = None
    if sampling.stop:
        matcher = StopStringMatcher(tokenizer.stream(), sampling.stop, sampling.min_tokens)
    choice = Choice(0, [], finish_reason=FinishReason.LENGTH)
    for token in tokens:
        choice.output_tokens.append(token)
        found = matcher.push([token]) if matcher else None
        if found or token in sequence.eos_token_ids:
            choice.stop_matched = found[1] if found else token
            choice.finish_reason = FinishReason.STOP
            break
    sequence.choices.append(choice)
    return choice


@pytest.fixture
def detokenize(drive, make_context):
    def run(lists, tokenizer=None, outlet=None):
        context = make_context()
        object.__setattr__(context, "engine", SimpleNamespace(tokenizer=tokenizer or NullTokenizer()))
        return drive(Detokenize, {}, lists, context, outlet).sent

    return run


def stream(sequence, choice, sizes=1):
    tokens = choice.output_tokens
    return [TokenDelta(sequence, choice.index, tokens[at : at + sizes]) for at in range(0, len(tokens), sizes)]


def test_a_sequence_becomes_a_completion_with_its_times(detokenize):
    timings = Timings(queued=11.0, scheduled=11.5, first_token=12.0, last_token=13.0, finished=13.25)
    sequence = sequence_of(stream=False, timings=timings)
    sequence.prefix_hit_tokens = 2
    choice = decode_as_the_worker_does(sequence, list(b"abcde"), NullTokenizer())
    (completion,) = detokenize([[sequence]])
    assert (completion.choices, choice.text, completion.prompt_length) == ([choice], "abcde", 3)
    assert completion.metrics.to_dict() == {
        "queue_ms": 1500.0, "ttft_ms": 2000.0, "tpot_ms": 250.0, "e2e_ms": 3250.0, "prefix_hit_tokens": 2
    }  # fmt: skip


def test_a_sequence_that_ended_before_its_first_token_has_an_empty_text(detokenize):
    sequence = sequence_of(timings=Timings(queued=11.0, finished=41.0))
    sequence.choices = [Choice(0, finish_reason=FinishReason.TIMEOUT)]
    (completion,) = detokenize([[sequence]])
    assert (completion.choices[0].text, completion.metrics.ttft_ms, completion.metrics.e2e_ms) == ("", 0.0, 31000.0)


def test_a_sequence_that_was_marked_as_failed_is_a_dead_letter(detokenize, outlet):
    sequence, collected = sequence_of(), outlet()
    decode_as_the_worker_does(sequence, list(b"ab"), NullTokenizer())
    sequence.error = "judged unfit"
    assert detokenize([[sequence]], outlet=collected) == []
    assert [(letter.error, letter.request_id) for letter in collected.letters] == [("judged unfit", "q")]


@pytest.fixture(scope="module")
def tool_tokenizer(checkpoint_folder):
    rust = Tokenizer.from_folder(checkpoint_folder("qwen3"))._rust
    rust.add_special_tokens(["<tool_call>", "</tool_call>"])
    return Tokenizer(rust, chat_template="{{ tools }}<tool_call>")


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": "é😀", "b": [1]}}\n</tool_call>'


@pytest.mark.parametrize("size", [1, 2, 7, 100, None])
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"I add:\n{CALL}\n{CALL}", "I add:", 2),
        (f"{CALL} <tool_call>{{}}</tool_call>", " <tool_call>{}</tool_call>", 1),
        ("No call at all, <tool_call>\n", "No call at all, <tool_call>\n", 0),
        (f"Stop here###{CALL}", "Stop here", 0),
        (f"{CALL}###", "", 1),
    ],
)
def test_calls_are_told_apart_from_the_text(detokenize, tool_tokenizer, text, content, calls, parallel, size):
    """At once (size None), and in deltas of so many tokens."""
    sequence = sequence_of(stream=size is not None, eos=(1,), stop=("###",))
    sequence.request.tools = [{"type": "function", "function": {"name": "add"}}]
    sequence.request.tool_choice = ToolChoice(parallel=parallel)
    ids = [*tool_tokenizer.encode(text, add_special_tokens=False), 1]
    choice = decode_as_the_worker_does(sequence, ids, tool_tokenizer.for_tools)
    deltas = [] if size is None else stream(sequence, choice, size)
    *deltas, completion = detokenize([[delta] for delta in deltas] + [[sequence]], tool_tokenizer)
    wanted = calls if parallel else min(calls, 1)
    assert choice.text == content
    assert [(call.name, call.arguments) for call in choice.tool_calls] == [("add", '{"a": "é😀", "b": [1]}')] * wanted
    assert completion.tool_calls is choice.tool_calls
    if size is not None:
        assert "".join(delta.text for delta in deltas) == content
        assert [call for delta in deltas for call in delta.tool_calls] == choice.tool_calls


def test_without_tools_nothing_is_taken_for_a_call(detokenize, tool_tokenizer):
    sequence = sequence_of(stream=False, eos=(1,))
    choice = decode_as_the_worker_does(sequence, tool_tokenizer.encode(CALL), tool_tokenizer)
    detokenize([[sequence]], tool_tokenizer)
    assert (choice.text, choice.tool_calls) == ('\n{"name": "add", "arguments": {"a": "é😀", "b": [1]}}\n', [])


def test_a_character_of_four_tokens_comes_whole(detokenize):
    sequence = sequence_of()
    choice = decode_as_the_worker_does(sequence, list("a😀b".encode()), NullTokenizer())
    *deltas, completion = detokenize([[*stream(sequence, choice), sequence]])
    assert [delta.text for delta in deltas] == ["a", "", "", "", "😀", "b"]
    assert completion.choices[0].text == "a😀b"


def test_bytes_that_never_became_a_character_come_at_the_end(detokenize):
    sequence = sequence_of()
    choice = decode_as_the_worker_does(sequence, [97, 0xF0, 0x9F], NullTokenizer())
    *deltas, completion = detokenize([stream(sequence, choice), [sequence]])
    assert [(delta.tokens, delta.text) for delta in deltas] == [([97], "a"), ([0xF0], ""), ([0x9F], ""), ([], "�")]
    assert completion.choices[0].text == "a�"


def test_no_part_of_a_stop_string_is_shown_but_what_only_began_like_one_is(detokenize):
    sequence = sequence_of(stop=("###", "##!"))
    choice = decode_as_the_worker_does(sequence, list(b"a##b##!c"), NullTokenizer())
    *deltas, completion = detokenize([[delta] for delta in stream(sequence, choice)] + [[sequence]])
    assert [delta.text for delta in deltas] == ["a", "", "", "##b", "", "", ""]
    assert (completion.choices[0].text, completion.choices[0].stop_matched) == ("a##b", "##!")
    assert completion.choices[0].output_tokens == list(b"a##b##!")


def test_a_stop_token_is_no_text_but_the_same_id_further_in_is(detokenize):
    sequence = sequence_of(eos=(), stop_token_ids=(33,))
    sequence.choices = [Choice(0, list(b"a!b!"), finish_reason=FinishReason.STOP, stop_matched=33)]
    *deltas, completion = detokenize([[*stream(sequence, sequence.choices[0]), sequence]])
    assert [delta.text for delta in deltas] == ["a", "", "!b", ""]
    assert completion.choices[0].text == "a!b"


def test_a_stop_string_complete_before_min_tokens_is_text(detokenize):
    sequence = sequence_of(stop=("x",), min_tokens=3)
    choice = decode_as_the_worker_does(sequence, list(b"axbxc"), NullTokenizer())
    *deltas, completion = detokenize([[*stream(sequence, choice), sequence]])
    assert completion.choices[0].text == "axb" == "".join(delta.text for delta in deltas)


def test_choices_of_one_request_do_not_mix(detokenize):
    sequence = sequence_of(n=2)
    for index, text in enumerate(("ä1", "ö2")):
        sequence.choices.append(Choice(index, list(text.encode()), finish_reason=FinishReason.LENGTH))
    first, second = (stream(sequence, choice) for choice in sequence.choices)
    mixed = [delta for pair in zip(first, second, strict=True) for delta in pair]
    *deltas, completion = detokenize([mixed, [sequence]])
    for index, text in enumerate(("ä1", "ö2")):
        assert "".join(delta.text for delta in deltas if delta.choice == index) == text
        assert completion.choices[index].text == text


ALPHABET = [*b"ab#", *"é😀".encode(), 257]


@pytest.mark.parametrize("kind", ["null", "checkpoint"])
def test_deltas_joined_are_the_final_text(kind, detokenize, checkpoint_folder):
    tokenizer = NullTokenizer() if kind == "null" else Tokenizer.from_folder(checkpoint_folder("llama3"))
    eos = 257 if kind == "null" else 1
    alphabet = [eos if token == 257 else token for token in ALPHABET]
    if kind == "checkpoint":
        alphabet = [token for text in ("ab#", "é😀", "the quick ") for token in tokenizer.encode(text)] + [eos]

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.sampled_from(alphabet), max_size=14),
        st.lists(st.sampled_from(["a", "ab", "##", "#a#", "é", "é😀", "b#", "qu"]), max_size=2, unique=True),
        st.integers(0, 5),
        st.integers(1, 4),
    )
    def check(tokens, stop, min_tokens, size):
        sequence = sequence_of(stop=tuple(stop), min_tokens=min_tokens, eos=(eos,))
        choice = decode_as_the_worker_does(sequence, tokens, tokenizer)
        sent = detokenize([[delta] for delta in stream(sequence, choice, size)] + [[sequence]], tokenizer)
        *deltas, completion = sent
        assert isinstance(completion, Completion)
        text = completion.choices[0].text
        assert "".join(delta.text for delta in deltas) == text
        assert [token for delta in deltas for token in delta.tokens] == choice.output_tokens
        whole = tokenizer.decode(choice.output_tokens)
        assert whole.startswith(text)
        if isinstance(choice.stop_matched, str):
            assert whole[len(text) :].startswith(choice.stop_matched)
        else:
            assert text == whole

    check()
