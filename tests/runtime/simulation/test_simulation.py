"""Simulations small enough to be computed by hand: a step takes 1 s, and 0.1 s for each of its tokens."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sageLLM.config import SageLLMConfig
from sageLLM.errors import ConfigError
from sageLLM.models.resolve import resolve_model
from sageLLM.records import FinishReason, Request, SamplingParams, Sequence
from sageLLM.runtime.simulation.cluster import Routing
from sageLLM.runtime.simulation.engine import HOP_S, Stages, Target
from sageLLM.runtime.simulation.simulation import simulate


class Times:
    kv_bytes_per_token = 4

    def step_seconds(self, decode_contexts, chunk_starts, chunk_lengths, logit_rows):
        return 1.0 + 0.1 * (len(decode_contexts) + sum(chunk_lengths))

    def decode_seconds(self, rows, contexts):
        return np.full(len(contexts), 1.0 + 0.1 * rows)

    def transfer_seconds(self, num_bytes, path):
        return {"handover": 0.01, "ddr": 0.5, "nvme": 3.0}[path] + num_bytes / 100


DDR = {"enable_tiering": True, "ddr_tokens": 400}
FILES = {"enable_tiering": True, "nvme_path": "/nonexistent", "nvme_tokens": 400}
MIGRATING = {**FILES, "ddr_tokens": 40, "enable_migration": True, "cold_timeout_s": 20}


def sequence(prompt, max_new_tokens, number=0, tenant="", interactive=True):
    sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0).with_defaults()
    request = Request(str(number), sampling=sampling, tenant=tenant, interactive=interactive)
    return Sequence(request, np.asarray(prompt, np.int32), sampling)


def run(
    *arrivals,
    blocks=64,
    stages=None,
    replicas=1,
    routing=Routing.LEAST_LOADED,
    layers=1,
    bytes_per_token=4,
    policy="fcfs",
    repeats=True,
    kv_cache=None,
    inference_mode="standard",
    **scheduler,
):
    """Outcomes by number, and the whole result; blocks are of four tokens, an output is a token of its own."""
    scheduler = {"queue_timeout_s": 0, "request_timeout_s": 0, "policy": policy, **scheduler}
    config = SageLLMConfig(
        model={"model_id": "builtin:null"},
        kv_cache={"max_tokens": 4 * blocks, "block_size": 4, **(kv_cache or {})},
        scheduler={"max_batch_size": 8, "max_step_tokens": 64, **scheduler},
        inference_mode=inference_mode,
    )
    sequences = [(at, sequence(prompt, n, i, **more)) for i, (at, prompt, n, more) in enumerate(arrivals)]
    model = resolve_model(config.model)
    target = Target(replace(model, architecture=replace(model.architecture, num_layers=layers)), "null", Times())
    target.times.kv_bytes_per_token = bytes_per_token
    result = simulate(
        sequences,
        config,
        stages or Stages(),
        target,
        lambda s: 1000 + int(s.request_id),
        replicas,
        routing,
        repeats=repeats,
    )
    return {int(outcome.request_id): outcome for outcome in result.outcomes}, result


def call(at, prompt, max_new_tokens, **more):
    return at, prompt, max_new_tokens, more


def test_a_lone_prompt_takes_its_chunks(monkeypatch):
    outcomes, result = run(call(5.0, range(10), 1), max_step_tokens=4)
    assert outcomes[0].ttft_s == pytest.approx(HOP_S + 1.4 + 1.4 + 1.2)  # chunks of 4, 4 and 2 tokens
    assert outcomes[0].tpot_s is None
    assert result.steps == 3
    assert result.busy_s == pytest.approx([4.0])
    assert outcomes[0].finished == pytest.approx(outcomes[0].first_token + HOP_S)


@pytest.mark.parametrize("launch_ahead", [True, False])
def test_output_tokens_follow_at_the_pace_of_the_steps(launch_ahead):
    outcomes, result = run(call(0, range(10), 5), launch_ahead=launch_ahead)
    assert outcomes[0].first_token == pytest.approx(HOP_S + 2.0)
    assert outcomes[0].last_token == pytest.approx(HOP_S + 2.0 + HOP_S + 4 * 1.1)
    assert outcomes[0].tpot_s == pytest.approx(1.1 + HOP_S / 4)
    assert result.latencies_s == pytest.approx([1.1 + HOP_S, 1.1, 1.1, 1.1])
    assert outcomes[0].output_tokens == 5


def test_what_arrives_during_a_step_is_in_the_one_after_the_next_where_steps_are_launched_ahead():
    """The second prompt comes while the first's fourth token is computed, with the fifth launched already."""
    for launch_ahead, steps_to_wait in ((True, 2), (False, 1)):
        begin = 2 * HOP_S + 2.0 + 3 * 1.1  # the fourth step of decoding
        outcomes, _ = run(call(0, range(10), 20), call(begin + 0.3, range(50, 60), 1), launch_ahead=launch_ahead)
        own = 1.0 + 0.1 * (10 + 1)
        assert outcomes[1].ttft_s == pytest.approx(-0.3 + steps_to_wait * 1.1 + own)


def test_without_a_slot_a_request_waits_for_the_end_of_the_one_before():
    first, second = call(0, range(10), 3), call(0, range(20, 30), 3)
    outcomes, _ = run(first, second, max_batch_size=1)
    assert outcomes[0].last_token == pytest.approx(2 * HOP_S + 2.0 + 2 * 1.1)
    assert outcomes[1].scheduled == pytest.approx(outcomes[0].last_token + HOP_S)
    assert outcomes[1].ttft_s == pytest.approx(outcomes[0].last_token + HOP_S + 2.0)


def test_a_preempted_row_is_computed_again():
    """Four blocks of four tokens; both rows want a third one for their ninth token.

    Prompts: 1.8 s. Four steps of both: 1.2 s each; then the younger row gives way, with 5 of 6 outputs known. The older
    one ends with its sixth, 1.1 s. The younger one's 9 tokens are computed again, but for what is cached of its prompt.
    """
    prompts = call(0, range(4), 6), call(0, range(10, 14), 6)
    outcomes, result = run(*prompts, blocks=4, launch_ahead=False)
    assert result.preemptions == 1
    assert outcomes[0].last_token == pytest.approx(2 * HOP_S + 1.8 + 4 * 1.2 + 1.1)
    again = 1.0 + 0.1 * (9 - 4)
    assert outcomes[1].last_token == pytest.approx(outcomes[0].last_token + again)
    assert [outcomes[i].output_tokens for i in (0, 1)] == [6, 6]
    outcomes, result = run(*prompts, blocks=6, launch_ahead=False)
    assert result.preemptions == 0
    assert outcomes[1].last_token == pytest.approx(2 * HOP_S + 1.8 + 5 * 1.2)


def test_a_cached_prefix_is_not_computed():
    outcomes, result = run(call(0, range(12), 1), call(100, [*range(8), 77, 78], 1))
    assert outcomes[1].hit_tokens == 8
    assert outcomes[1].ttft_s == pytest.approx(HOP_S + 1.2)
    assert (result.hit_tokens, result.queried_tokens) == (8, 22)
    for stages in (Stages(looks_up=False), Stages(commits=False)):
        outcomes, result = run(call(0, range(12), 1), call(100, [*range(8), 77, 78], 1), stages=stages)
        assert result.hit_tokens == 0


def test_a_shared_prefix_that_is_being_computed_is_waited_for():
    outcomes, _ = run(call(0, range(12), 1), call(0, [*range(8), 77, 78], 1), max_step_tokens=12)
    assert outcomes[1].hit_tokens == 8
    assert outcomes[1].scheduled == pytest.approx(outcomes[0].first_token + 2 * HOP_S)


@pytest.mark.parametrize(("layers", "waits_s"), [(1, 0.01 + 0.4), (4, 0.01 + 0.1), (20, 0.01 + 0.02)])
def test_kv_is_handed_over_while_later_layers_compute(layers, waits_s):
    """10 tokens are 40 bytes, 0.4 s; a step takes 2 s. What the prompt waits for is its last layer's share."""
    outcomes, result = run(call(0, range(10), 3), mode="strict", layers=layers)
    assert outcomes[0].ttft_s == pytest.approx(HOP_S + 2.0 + waits_s)
    assert outcomes[0].last_token == pytest.approx(outcomes[0].first_token + HOP_S + 2 * 1.1)
    assert result.busy_s == pytest.approx([2.0, 2.2])
    assert result.latencies_s == pytest.approx([1.1 + HOP_S, 1.1])


def test_a_link_that_is_slower_than_the_layers_holds_up_the_next_prompt():
    """Four layers of 100 and of 20 tokens, 11 s and 3 s to compute, take 100 s and 20 s each to send."""
    prompts = call(0, range(100), 1), call(0, range(100, 120), 1)
    outcomes, _ = run(*prompts, mode="strict", layers=4, max_step_tokens=100, bytes_per_token=400)
    sent = HOP_S + 11 / 4 + 4 * (0.01 + 100)
    assert outcomes[0].first_token == pytest.approx(sent)
    assert outcomes[1].first_token == pytest.approx(sent + 4 * (0.01 + 20))


def test_decoding_suffers_from_prompts_in_hybrid_but_not_in_strict():
    """A long prompt comes while another request decodes."""
    for mode, slowest in (("hybrid", 1.0 + 0.1 * 17), ("strict", 1.1)):
        _, result = run(call(0, range(4), 12), call(4.0, range(100, 164), 1), mode=mode, max_step_tokens=17)
        assert result.latencies_s[1:].max() == pytest.approx(slowest)


def test_timeouts_are_met_to_the_moment():
    patient, hasty = call(0, range(10), 40), call(1.0, range(20, 30), 3)
    outcomes, _ = run(patient, hasty, max_batch_size=1, queue_timeout_s=7)
    assert (outcomes[1].reason, outcomes[1].finished) == (FinishReason.QUEUE_TIMEOUT, 8.0)
    outcomes, _ = run(patient, max_batch_size=1, request_timeout_s=20)
    assert outcomes[0].reason is FinishReason.TIMEOUT
    assert 20 < outcomes[0].finished < 20 + 1.1 + 2 * HOP_S


def test_what_can_never_fit_ends_at_once():
    outcomes, _ = run(call(3.0, range(300), 1), call(3.0, range(4), 1), call(4.0, range(4), 40_000))
    assert [outcomes[i].reason for i in range(3)] == [FinishReason.ERROR, FinishReason.LENGTH, FinishReason.ERROR]
    assert outcomes[0].finished == 3.0


def test_the_bounds_of_schedule_hold_back_what_arrives():
    """With room for one to wait, the policy cannot see the urgent third one behind the second."""

    class OneWaits:
        def is_reached(self, waiting):
            return len(waiting) >= 1

    arrivals = call(0, range(10), 3), call(0.1, range(20, 30), 30), call(0.2, range(40, 50), 2)
    shortest = {"policy": "shortest_job", "max_batch_size": 1}
    outcomes, _ = run(*arrivals, **shortest)
    assert outcomes[2].scheduled < outcomes[1].scheduled
    outcomes, _ = run(*arrivals, stages=Stages(OneWaits()), **shortest)
    assert outcomes[1].scheduled < outcomes[2].scheduled


@pytest.mark.parametrize(
    ("routing", "routes"),
    [
        (Routing.ROUND_ROBIN, [0, 1, 0, 1]),
        (Routing.LEAST_LOADED, [0, 1, 1, 0]),
        (Routing.PREFIX_AWARE, [0, 1, 1, 1]),
    ],
)
def test_routing(routing, routes):
    """Long, short, short; the fourth, when all are done, continues the third. But for whole seconds, a device's
    time tells how many tokens it computed, modulo 10."""
    prompts = [range(43), range(100, 112), range(200, 226), [*range(200, 226), 5]]
    arrivals = [call(at, prompt, 1) for at, prompt in zip((0, 0, 0, 100), prompts, strict=True)]
    _, result = run(*arrivals, replicas=2, routing=routing)
    hit = 26 if routing is Routing.PREFIX_AWARE else 0
    tokens = [-hit if route == routes[3] else 0 for route in (0, 1)]
    for route, prompt in zip(routes, prompts, strict=True):
        tokens[route] += len(prompt)
    assert result.hit_tokens == hit
    assert [round(10 * busy) % 10 for busy in result.busy_s] == [count % 10 for count in tokens]


requests = st.lists(
    st.tuples(st.floats(0, 30), st.integers(1, 40), st.integers(1, 12), st.integers(0, 2)), min_size=1, max_size=12
)


@settings(max_examples=25, deadline=None)
@given(
    requests,
    st.sampled_from(["fcfs", "shortest_job", "fair_share", "longest_prefix"]),
    st.sampled_from(["hybrid", "time_share", "strict"]),
    st.integers(1, 3),
    st.booleans(),
)
def test_any_mix_ends_and_is_deterministic(drawn, policy, mode, replicas, launch_ahead):
    arrivals = [call(at, [group, *range(length)], n, tenant=f"t{group}") for at, length, n, group in sorted(drawn)]
    options = {"policy": policy, "mode": mode, "replicas": replicas, "launch_ahead": launch_ahead, "blocks": 16}
    options |= {"max_batch_size": 3, "max_step_tokens": 16}
    if mode == "strict":
        options |= {"replicas": 1, "prefill_workers": replicas, "decode_workers": 3 - replicas // 2}
    outcomes, result = run(*arrivals, **options)
    assert len(outcomes) == len(arrivals)
    for number, (at, prompt, n, _) in enumerate(arrivals):
        outcome = outcomes[number]
        assert (outcome.reason, outcome.output_tokens) == (FinishReason.LENGTH, n)
        fewest = -(-(len(prompt) - outcome.hit_tokens) // 16)
        assert outcome.arrival == at <= outcome.scheduled < outcome.first_token <= outcome.last_token
        assert outcome.first_token - at > fewest
        assert outcome.last_token - outcome.first_token > (n - 1) * 1.1 - 1e-6
    assert len(result.latencies_s) == sum(n - 1 for _, _, n, _ in arrivals)
    assert max(result.busy_s) <= result.elapsed_s
    again, other = run(*arrivals, **options)
    assert again == outcomes
    assert [*again] == [*outcomes]
    assert (other.busy_s, other.steps, other.latencies_s.tolist()) == (
        result.busy_s,
        result.steps,
        result.latencies_s.tolist(),
    )


long_requests = st.lists(
    st.tuples(
        st.one_of(st.floats(0, 60), st.integers(0, 60)), st.integers(1, 40), st.integers(1, 90), st.integers(0, 2)
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=30, deadline=None)
@given(
    long_requests,
    st.sampled_from(["fcfs", "shortest_job", "fair_share", "longest_prefix"]),
    st.sampled_from(["hybrid", "time_share", "strict"]),
    st.sampled_from(list(Routing)),
    st.fixed_dictionaries(
        {
            "blocks": st.sampled_from([34, 50, 200]),
            "launch_ahead": st.booleans(),
            "max_batch_size": st.integers(1, 6),
            "max_decode_batch": st.integers(1, 6),
            "request_timeout_s": st.sampled_from([0, 50]),
            "tpot_slo_ms": st.sampled_from([None, 1700]),
            "kv_cache": st.sampled_from([{}, {"ttl_s": 20}, {"eviction": "cost"}, DDR, MIGRATING]),
            "preemption": st.sampled_from(["recompute", "swap"]),
        }
    ),
    st.integers(1, 3),
)
def test_steps_that_are_alike_come_to_the_same_at_once_and_one_by_one(drawn, policy, mode, routing, options, replicas):
    arrivals = [call(at, [group, *range(length)], n, tenant=f"t{group}") for at, length, n, group in sorted(drawn)]
    options |= {"policy": policy, "mode": mode, "routing": routing, "replicas": replicas, "max_step_tokens": 16}
    options["max_decode_batch"] = min(options["max_decode_batch"], options["max_batch_size"])
    if mode == "strict":
        options |= {"replicas": 1, "prefill_workers": replicas, "decode_workers": 3 - replicas // 2}
    if not options["kv_cache"].get("enable_tiering"):
        options["preemption"] = "recompute"
    at_once, one_by_one = (asdict(run(*arrivals, repeats=repeats, **options)[1]) for repeats in (True, False))
    assert at_once.pop("latencies_s").tolist() == one_by_one.pop("latencies_s").tolist()
    assert at_once == one_by_one


def copy_s(blocks, path="ddr"):
    return Times().transfer_seconds(16 * blocks, path)


def test_what_comes_up_from_ddr_takes_its_time_and_so_does_what_goes_down():
    """Six blocks of four tokens: the second prompt pushes two of the first's three blocks out.

    The third, which repeats the first, has one block fetched, for which one more is given up; its lease takes another.
    """
    prompts = call(0, range(12), 1), call(100, range(100, 120), 1), call(200, range(12), 1)
    outcomes, result = run(*prompts, blocks=6, kv_cache=DDR)
    assert outcomes[1].ttft_s == pytest.approx(HOP_S + copy_s(2) + 3.0)
    assert outcomes[2].ttft_s == pytest.approx(copy_s(1) + copy_s(1) + HOP_S + copy_s(1) + 1.4)
    assert (result.hit_tokens, result.ddr_hit_tokens, result.nvme_hit_tokens) == (8, 4, 0)
    outcomes, result = run(*prompts, blocks=6)
    assert outcomes[2].ttft_s == pytest.approx(HOP_S + 1.8)
    assert (result.hit_tokens, result.ddr_hit_tokens) == (4, 0)


def test_a_row_that_was_swapped_out_comes_up_again():
    """What `test_a_preempted_row_is_computed_again` computes again, but for what its prompt has cached, is fetched."""
    prompts = call(0, range(4), 6), call(0, range(10, 14), 6)
    outcomes, result = run(*prompts, blocks=4, launch_ahead=False, preemption="swap", kv_cache=DDR)
    assert (result.preemptions, result.ddr_hit_tokens) == (1, 4)
    assert [outcomes[i].output_tokens for i in (0, 1)] == [6, 6]


def test_prefill_only_ends_with_the_first_token_when_all_whole_blocks_are_in_files():
    outcomes, _ = run(call(0, range(13), 9), inference_mode="prefill_only", kv_cache=FILES)
    assert outcomes[0].output_tokens == 1
    assert outcomes[0].ttft_s == pytest.approx(HOP_S + 2.3)
    assert outcomes[0].finished == pytest.approx(2 * HOP_S + 2.3 + copy_s(3) + 3 * copy_s(1, "nvme"))
    outcomes, _ = run(call(0, range(13), 9), inference_mode="prefill_only")
    assert outcomes[0].finished == pytest.approx(2 * HOP_S + 2.3)


def test_decode_only_finds_every_prompt_in_files():
    outcomes, result = run(call(0, range(13), 9), inference_mode="decode_only", kv_cache=FILES)
    assert outcomes[0].ttft_s == pytest.approx(copy_s(3, "nvme") + HOP_S + 1.1)
    assert result.nvme_hit_tokens == 12
    with pytest.raises(ConfigError, match="all KV is in files; write recompute"):
        run(call(0, range(13), 9), inference_mode="decode_only", kv_cache=FILES, on_transfer_failure="fail")
