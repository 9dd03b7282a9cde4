"""kv_lookup: sequences in, the same sequences out, each marked with how much of its prompt is cached."""

from __future__ import annotations

import numpy as np
import pytest

from sageLLM.operators.kv_commit import KVCommit
from sageLLM.operators.kv_lookup import KVLookup
from sageLLM.operators.prefill import Prefill
from sageLLM.operators.schedule import Schedule

PROMPT = list(range(10))


def cache(engine, tokens, tenant="", salt=""):
    """As if a request with these tokens had been computed before."""
    blocks = engine.services.kv.allocate(-(-len(tokens) // 4))
    engine.services.kv.commit(np.asarray(tokens, np.int32), blocks, (tenant, salt))
    engine.services.kv.release(blocks)


def look_up(on_loop, engine, *sequences):
    async def main():
        async with engine.stage(KVLookup) as lookup:
            return await lookup.put(*sequences)

    return on_loop(main)


def test_every_sequence_goes_on_in_order_with_a_hint(on_loop, null_engine):
    engine = null_engine()
    sequences = [engine.sequence([n, n, n]) for n in range(5)]
    assert look_up(on_loop, engine, *sequences) == sequences
    assert [sequence.kv.tokens for sequence in sequences] == [0] * 5


@pytest.mark.parametrize(
    ("cached", "hit"),
    [
        (PROMPT[:8], 8),  # two whole blocks
        (PROMPT[:5], 5),  # a prefix that ends inside a block counts by the token
        ([*PROMPT[:6], 77, 78], 6),
        (PROMPT, 9),  # the last token is always computed: it gives the first output
        ([99, *PROMPT], 0),
    ],
)
def test_the_hint_is_the_longest_cached_prefix(on_loop, null_engine, cached, hit):
    engine = null_engine()
    cache(engine, cached)
    (sequence,) = look_up(on_loop, engine, engine.sequence(PROMPT))
    assert sequence.kv.tokens == hit


def test_tenants_and_salts_do_not_share(on_loop, null_engine):
    engine = null_engine()
    cache(engine, PROMPT, tenant="a", salt="x")
    others = [engine.sequence(PROMPT, tenant=t, salt=s) for t, s in (("a", "x"), ("b", "x"), ("a", "y"), ("", ""))]
    assert [sequence.kv.tokens for sequence in look_up(on_loop, engine, *others)] == [9, 0, 0, 0]


def test_a_lookup_holds_no_block_and_counts_no_hit(on_loop, null_engine):
    engine = null_engine()
    cache(engine, PROMPT)
    look_up(on_loop, engine, engine.sequence(PROMPT))
    engine.check_nothing_leaks()
    assert engine.services.get_stats()["kv_cache"]["cache_queries"] == 0


@pytest.mark.parametrize("with_lookup", [True, False])
def test_only_a_sequence_that_was_looked_up_reuses_a_prefix(on_loop, null_engine, with_lookup):
    engine = null_engine()
    cache(engine, PROMPT)
    sequence = engine.sequence(PROMPT)
    if with_lookup:
        look_up(on_loop, engine, sequence)

    async def main():
        async with engine.stage(Schedule) as schedule:
            await schedule.put(sequence)
        engine.services.release([sequence.request])

    on_loop(main)
    assert sequence.prefix_hit_tokens == (9 if with_lookup else 0)
    engine.check_nothing_leaks()


def test_what_is_cached_after_the_lookup_is_reused_too(on_loop, null_engine):
    engine = null_engine()
    first, second = engine.sequence(PROMPT), engine.sequence([*PROMPT[:9], 50, 51])

    async def main():
        async with (
            engine.services.running(),
            engine.stage(KVLookup) as lookup,
            engine.stage(Schedule) as schedule,
            engine.stage(Prefill) as prefill,
            engine.stage(KVCommit) as commit,
        ):
            await lookup.put(first, second)
            assert second.kv.tokens == 0
            await commit.put(*await prefill.put(*await schedule.put(first)))
            await schedule.put(second)
            engine.services.release([first.request, second.request])
            await schedule.settled()

    on_loop(main)
    assert second.prefix_hit_tokens == 9
    engine.check_nothing_leaks()
