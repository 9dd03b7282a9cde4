"""The standard pipeline gives the same results whatever the event loop, the order of tasks and the time it takes."""

from __future__ import annotations

import pytest

from sageLLM.records import TokenDelta


@pytest.fixture(scope="module")
def expected():
    def tokens_of(request):
        length = len(request.prompt_tokens)
        count = 0 if request.pooling is not None else request.sampling.max_new_tokens
        one = [97 + (length + k) % 26 for k in range(count)]
        return [one] * request.sampling.n

    return lambda requests: {request.request_id: tokens_of(request) for request in requests}


@pytest.mark.parametrize("seed", range(6))
def test_every_request_is_answered_in_any_interleaving(make_run, make_requests, small_engine, expected, seed):
    requests = make_requests(40, seed=1)
    run = make_run(requests, small_engine, seed=seed)()
    assert run.error is None
    assert run.counts == {"accepted": 40, "done": 40}
    assert run.tokens == expected(requests)


def test_asyncio_in_real_time_gives_the_same(make_run, make_requests, small_engine, expected):
    requests = make_requests(40, seed=1)
    run = make_run(requests, small_engine, backend="asyncio")()
    assert run.counts == {"accepted": 40, "done": 40}
    assert run.tokens == expected(requests)


@pytest.mark.parametrize("seed", range(3))
def test_memory_for_barely_one_request_at_a_time(make_run, make_requests, expected, seed):
    engine = {"kv_cache": {"max_tokens": 56, "block_size": 4}, "scheduler": {"max_batch_size": 4}}
    requests = make_requests(30, seed=2)
    run = make_run(requests, engine, seed=seed)()
    assert run.counts == {"accepted": 30, "done": 30}
    assert run.tokens == expected(requests)
    assert run.services.worker.preemptions > 0


@pytest.mark.parametrize("without", ["kv_lookup", "kv_commit", "metrics"])
def test_a_stage_that_is_left_out_costs_no_result(make_run, make_requests, small_engine, expected, without):
    stages = [s for s in make_run.__dataclass_fields__["stages"].default if s != without]
    requests = make_requests(30, seed=3)
    run = make_run(requests, small_engine, stages=tuple(stages))()
    assert run.tokens == expected(requests)
    hits = sum(completion.metrics.prefix_hit_tokens for completion in run.completions.values())
    assert (hits > 0) == (without == "metrics")


@pytest.mark.parametrize("seed", range(3))
def test_streams_come_in_order_before_their_end(make_run, make_requests, small_engine, seed):
    run = make_run(make_requests(30, seed=4, stream=True), small_engine, seed=seed)()
    assert run.counts == {"accepted": 30, "done": 30}
    texts, ended, streamed = {}, set(), 0
    for record in run.kept:
        assert record.request_id not in ended
        if isinstance(record, TokenDelta):
            key = record.request_id, record.choice
            texts[key] = texts.get(key, "") + record.text
            continue
        ended.add(record.request_id)
        for choice in record.choices:
            if record.request.stream:
                streamed += 1
                assert texts[record.request_id, choice.index] == choice.text
    assert streamed
    assert len(texts) == streamed


def test_the_same_seed_is_the_same_run(make_run, make_requests, small_engine):
    orders = []
    for seed in (5, 5, 6):
        run = make_run(make_requests(30, seed=1), small_engine, seed=seed)()
        orders.append([record.request_id for record in run.kept])
    assert orders[0] == orders[1]
    assert orders[0] != orders[2], "the seed changes nothing: the tests of interleavings mean nothing"
