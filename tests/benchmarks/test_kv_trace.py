"""`sagellm bench kv-trace`: the real cache finds what a plain LRU list of blocks would, and a torn trace is refused."""

from __future__ import annotations

import json
import random
from collections import OrderedDict

import numpy as np
import pytest

from sageLLM.benchmarks.kv_trace import replay
from sageLLM.benchmarks.traces import read_block_ids
from sageLLM.config import KVEviction
from sageLLM.errors import ConfigError


def conversations(count, seed=0):
    """`count` turns of conversations, some of which share their first blocks; an id is that of one prefix."""
    rng = random.Random(seed)
    ids, known = {}, [()]
    requests = []
    for _ in range(count):
        turn = rng.choice(known[-12:])
        turn = turn[: rng.randint(0, len(turn))] if rng.random() < 0.3 else turn
        turn += tuple(rng.randint(0, 2) for _ in range(rng.randint(1, 4)))
        turn = turn[:16]
        known.append(turn)
        requests.append([ids.setdefault(turn[:end], len(ids)) for end in range(1, len(turn) + 1)])
    return requests


def write(path, requests):
    path.write_text("".join(json.dumps({"timestamp": 0, "hash_ids": ids}) + "\n" for ids in requests))
    return path


def lru_hits(requests, size):
    """Of each request's blocks the last is the oldest, for a prefix is of use without what follows, not without it."""
    cached, hits = OrderedDict(), 0
    for ids in requests:
        hits += next((index for index, block in enumerate(ids) if block not in cached), len(ids))
        for block in reversed(ids):
            cached[block] = None
            cached.move_to_end(block)
        while len(cached) > size:
            cached.popitem(last=False)
    return hits


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [16, 40, 100])
def test_lru_hits_what_a_plain_list_would(tmp_path, size, seed):
    requests = conversations(300, seed)
    result = replay(read_block_ids(write(tmp_path / "trace.jsonl", requests)), size, KVEviction.LRU)
    assert result.lookups == 300
    assert result.looked_up_blocks == sum(map(len, requests))
    assert result.hit_blocks == lru_hits(requests, size)


@pytest.mark.parametrize("eviction", KVEviction)
def test_an_unlimited_pool_hits_all_that_came_before(tmp_path, eviction):
    requests = conversations(300)
    result = replay(read_block_ids(write(tmp_path / "trace.jsonl", requests)), None, eviction)
    distinct = len({block for ids in requests for block in ids})
    assert result.hit_blocks == result.looked_up_blocks - distinct
    assert result.hit_rate == pytest.approx(1 - distinct / result.looked_up_blocks)
    assert result.lookups_per_second == pytest.approx(300 / result.seconds)


def test_late_blocks_save_more_time_than_early_ones(tmp_path):
    trace = read_block_ids(write(tmp_path / "trace.jsonl", [[*range(96)], [*range(48)]]))
    result = replay(trace, None, KVEviction.COST)
    assert result.hit_rate == pytest.approx(48 / 144)
    assert result.saved_time == pytest.approx((48 + 24) / (96 + 96 + 48 + 24)), "attention costs as much from 48 on"


def test_ids_of_any_size_are_numbered_anew(tmp_path):
    trace = read_block_ids(write(tmp_path / "trace.jsonl", [[2**62, 5], [], [2**62, 7]]))
    assert [ids.tolist() for ids in trace] == [[2, 0], [], [2, 1]]
    assert {ids.dtype for ids in trace} == {np.dtype(np.int32)}
    assert replay(trace, 2, KVEviction.LRU).hit_blocks == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"hash_ids": 3}', r'hash_ids: 3, write "hash_ids": \[0, 1\]'),
        ('{"hash_ids": ["a"]}', '"a" in hash_ids, write integers from 0 to'),
        ('{"hash_ids": [true]}', "true in hash_ids, write integers from 0 to"),
        ('{"hash_ids": [18446744073709551616]}', "18446744073709551616 in hash_ids, write integers from 0 to"),
        ("[1]", r'\[1\], write an object like \{"hash_ids": \[0, 1\]\}'),
        ("{", r"\{, which is no JSON \(.*\), write an object like"),
        ("{}", r'no hash_ids, write "hash_ids": \[0, 1\]'),
    ],
)
def test_a_line_that_is_no_request_is_refused_with_its_place(tmp_path, line, said):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"hash_ids": [1]}\n\n' + line + "\n")
    with pytest.raises(ConfigError, match="trace.jsonl:3: found " + said):
        read_block_ids(path)


@pytest.mark.parametrize("text", ["", "\n\n", '{"hash_ids": []}\n'])
def test_a_trace_without_blocks_is_refused(tmp_path, text):
    (tmp_path / "trace.jsonl").write_text(text)
    with pytest.raises(ConfigError, match="no block to look up"):
        read_block_ids(tmp_path / "trace.jsonl")


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_block_ids(tmp_path)


def test_a_pool_that_does_not_hold_the_longest_request_is_refused(tmp_path):
    trace = read_block_ids(write(tmp_path / "trace.jsonl", [[1, 2, 3], [4]]))
    with pytest.raises(ConfigError, match="2 blocks do not hold the longest request of the trace, give at least 3"):
        replay(trace, 2, KVEviction.LRU)
