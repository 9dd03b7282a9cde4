"""`sagellm bench radix` on a pool of a few blocks."""

from __future__ import annotations

from sageLLM.benchmarks.radix import measure_radix
from sageLLM.config import KVEviction


def test_each_kind_of_call_is_timed_as_often_as_asked():
    times = measure_radix(400, 300, KVEviction.COST, repeats=3)
    assert {name for name in times.calls if name.startswith("lookup")} == {
        "lookup, whole cached in 100 nodes",
        *(f"lookup, {part} cached" for part in ("whole", "two thirds", "a third", "nothing")),
    }
    assert {len(calls) for calls in times.calls.values()} == {3}
    assert [row[0] for row in times.rows()] == [*times.calls]
