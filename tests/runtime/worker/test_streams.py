"""Deltas of streams: each token once, in order, before the end; at each step, or joined while deltas rest."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sageLLM.records import TokenDelta


@pytest.fixture
def came_of():
    """All that comes back from a worker's decode door, in one list."""

    def listen(b):
        came = []
        b.worker.on_decoded = lambda records: (came.extend(records), b._decoded(records))
        return came

    return listen


def tokens_of(came, sequence, choice=0):
    return [
        record.tokens
        for record in came
        if isinstance(record, TokenDelta) and record.sequence is sequence and record.choice == choice
    ]


def test_each_step_tells_its_token(bench, came_of, null_tokens):
    b = bench()
    came, sequence = came_of(b), b.sequence(range(5), max_new_tokens=7, stream=True)
    b.offer(sequence, b.sequence(range(9), max_new_tokens=7))  # who waits for the end only is told nothing
    b.run()
    assert tokens_of(came, sequence) == [[token] for token in null_tokens(5, 7)]
    assert sum(isinstance(record, TokenDelta) for record in came) == 7


def test_only_the_first_and_the_last_do_not_rest(bench, came_of, null_tokens):
    b = bench()
    came, sequence = came_of(b), b.sequence(range(5), max_new_tokens=20, n=2, stream=True)
    b.offer(sequence)
    b.worker.rest_deltas(True)
    b.run()
    for choice in (0, 1):
        first, rest = tokens_of(came, sequence, choice)
        assert len(first) <= 2  # as many as a choice may have when its prompt comes back
        assert first + rest == null_tokens(5, 20)
    assert came[-1] is sequence


def test_what_has_rested_is_told_by_the_next_step(bench, came_of):
    b = bench()
    came, sequence = came_of(b), b.sequence(range(5), max_new_tokens=20, stream=True)
    b.offer(sequence)
    told = []

    def between():
        told.append(sum(map(len, tokens_of(came, sequence))))
        b.worker.rest_deltas(len(told) % 6 != 0)

    b.run(between=between)
    sizes = [len(tokens) for tokens in tokens_of(came, sequence)]
    assert sum(sizes) == 20
    assert sizes[2:-1] == [6, 6]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.booleans())
def test_each_token_comes_once_in_order_and_before_the_end_however_they_rest(bench, came_of, seed, strict):
    chance = random.Random(seed)
    workers = {"mode": "strict", "decode_workers": 2} if strict else {}
    b = bench(blocks=24, seed=seed, max_step_tokens=chance.choice((8, 64)), slow_doors=chance.random() < 0.5, **workers)
    came = came_of(b)
    sizes = [(chance.randint(1, 12), chance.randint(1, 16), chance.randint(1, 2)) for _ in range(6)]
    sequences = [b.sequence(range(prompt), max_new_tokens=most, n=n, stream=True) for prompt, most, n in sizes]
    left = [*sequences]

    def between():
        b.worker.rest_deltas(chance.random() < 0.7)
        if left and chance.random() < 0.5:
            b.offer(left.pop())
        if chance.random() < 0.05:
            b.worker.cancel([chance.choice(sequences).request])

    between()
    while left:
        b.run(between=between)
    b.run()
    for sequence in sequences:
        for choice in sequence.choices:
            deltas = tokens_of(came, sequence, choice.index)
            assert all(deltas)
            told = [token for tokens in deltas for token in tokens]
            assert told == choice.output_tokens[: len(told)]
            assert told == choice.output_tokens or sequence.request.cancelled  # before it came to decode
    ended = set()
    for record in came:
        if isinstance(record, TokenDelta):
            assert id(record.sequence) not in ended
        else:
            ended.add(id(record))
    b.check_nothing_leaks()
