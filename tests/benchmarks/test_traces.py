"""Traces as sequences: prefixes are equal where the trace says so, and lines that are no request are refused."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from sageLLM.benchmarks.traces import TraceReplay, read_requests
from sageLLM.errors import ConfigError
from sageLLM.kv_runtime.radix_tree import common_prefix_length


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def replay(tmp_path, *lines):
    trace = TraceReplay(read_requests(write(tmp_path / "trace.jsonl", *lines)))
    return trace, [*trace.arrivals()]


def test_equal_ids_are_equal_blocks_of_512_tokens(tmp_path):
    lines = [
        {"timestamp": 2000, "input_length": 1100, "output_length": 5, "hash_ids": [7, 2**62, 9]},
        {"timestamp": 2500, "input_length": 1300, "output_length": 6, "hash_ids": [7, 2**62, 10]},
        {"timestamp": 2750, "input_length": 1024, "output_length": 7, "hash_ids": [8, 2**62]},
    ]
    _, arrivals = replay(tmp_path, *lines)
    assert [at for at, _ in arrivals] == [0, 0.5, 0.75]
    first, second, third = (sequence.prompt_tokens for _, sequence in arrivals)
    assert [len(first), len(second), len(third)] == [1100, 1300, 1024]
    assert first.dtype == np.int32
    assert common_prefix_length(first, second) == 1024
    assert common_prefix_length(first, third) == 0
    assert [sequence.sampling.max_new_tokens for _, sequence in arrivals] == [5, 6, 7]


def test_prompts_of_which_only_the_length_is_known_share_nothing(tmp_path):
    lines = [
        {"timestamp": 0, "prompt_tokens": 30, "max_new_tokens": 5},
        {"timestamp": 0, "input_length": 40, "output_length": 5, "tenant": "a", "priority": 2, "deadline_ms": 50},
        {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]},
        {"timestamp": 0, "prompt_tokens": [5, 6, 7], "max_new_tokens": 5},
    ]
    trace, arrivals = replay(tmp_path, *lines)
    sequences = [sequence for _, sequence in arrivals]
    heads = {int(sequence.prompt_tokens[0]) for sequence in sequences}
    outputs = {trace.output_token(sequence) for sequence in sequences}
    assert len(heads | outputs) == 8
    assert sequences[3].prompt_tokens.tolist() == [5, 6, 7]
    request = sequences[1].request
    assert (request.tenant, request.priority, request.deadline_ms) == ("a", 2, 50)


def test_requests_come_by_time_and_as_fast_as_asked_for(tmp_path):
    lines = [{"timestamp": at, "input_length": n, "output_length": 1} for at, n in ((3000, 1), (1000, 2), (3000, 3))]
    trace, _ = replay(tmp_path, *lines)
    assert [(at, len(sequence.prompt_tokens)) for at, sequence in trace.arrivals(4)] == [(0, 2), (0.5, 1), (0.5, 3)]


def test_what_comes_at_one_moment_may_be_spread_up_to_the_next(tmp_path):
    times = [1000, 1000, 1000, 4000, 5000, 5000]
    lines = [{"timestamp": at, "input_length": 1, "output_length": 1} for at in times]
    requests = read_requests(write(tmp_path / "trace.jsonl", *lines))
    spread = [at for at, _ in TraceReplay(requests, spread=True).arrivals(2)]
    assert spread == [0, 0.5, 1, 1.5, 2, 2.5]
    assert [at for at, _ in TraceReplay(requests[:2], spread=True).arrivals()] == [0, 0]


GOOD = {"timestamp": 0, "input_length": 5, "output_length": 5}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"timestamp": None}, 'no timestamp, write "timestamp": 0, the milliseconds'),
        ({"input_length": None}, 'no input_length, write "input_length": 20'),
        ({"output_length": None}, 'no output_length, write "output_length": 20'),
        ({"input_length": 0}, "input_length: 0, write a number of tokens, at least 1"),
        ({"output_length": 0}, "output_length: 0, write a number of tokens"),
        ({"input_length": "5"}, 'input_length: "5", write a number of tokens'),
        ({"output_length": True}, "output_length: true, write a number of tokens"),
        ({"max_new_tokens": 2.5}, "max_new_tokens: 2.5, write a number of tokens"),
        ({"timestamp": "now"}, 'timestamp: "now", write milliseconds'),
        ({"timestamp": float("nan")}, "timestamp: NaN, write milliseconds"),
        ({"timestamp": -3}, "timestamp: -3, write milliseconds"),
        ({"tenant": 3}, "tenant: 3, write a name in quotes"),
        ({"priority": 0.5}, "priority: 0.5, write an integer"),
        ({"deadline_ms": "soon"}, 'deadline_ms: "soon", write milliseconds'),
        ({"input_length": 513, "hash_ids": [1]}, "1 hash_ids for 513 tokens, write 2, one for each 512"),
        ({"hash_ids": ["a"]}, '"a" in hash_ids, write integers from 0'),
        ({"hash_ids": [2**63]}, "9223372036854775808 in hash_ids, write integers from 0"),
        ({"hash_ids": 7}, 'hash_ids: 7, write "hash_ids": [0, 1]'),
        ({"prompt_tokens": [2**40]}, "1099511627776 in prompt_tokens, write integers from 0 to 16777215"),
        ({"prompt_tokens": []}, "prompt_tokens: [], write at least one token"),
    ],
)
def test_what_is_wrong_with_a_line_is_told_by_its_number(tmp_path, change, said):
    bad = {name: value for name, value in (GOOD | change).items() if value is not None}
    with pytest.raises(ConfigError, match=re.escape("trace.jsonl:2: found " + said)):
        read_requests(write(tmp_path / "trace.jsonl", GOOD, bad))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[1, 2]", "[1, 2], write an object"),
        ("3", "3, write an object"),
        ('{"timestamp', '{"timestamp, which is no JSON'),
    ],
)
def test_a_line_that_is_no_object_is_refused(tmp_path, line, said):
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(ConfigError, match=re.escape("trace.jsonl:3: found " + said)):
        read_requests(path)


def test_an_empty_trace_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="found no request, write a line for each"):
        read_requests(write(tmp_path / "trace.jsonl"))
