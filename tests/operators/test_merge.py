"""merge: what arrives on any edge leaves on one."""

from __future__ import annotations

from sageLLM.operators.merge import Merge
from sageLLM.records import DeadLetter, Request


def test_records_of_all_edges_leave_once_and_in_the_order_of_their_edge(through):
    given = [record for n in range(20) for record in (Request(str(n), prompt="p"), DeadLetter(str(n)))]
    kept, counts = through(Merge, {}, given, ["out"])
    assert len(kept["out"]) == 40
    for kind in (Request, DeadLetter):
        ours = [record for record in kept["out"] if isinstance(record, kind)]
        assert ours == [record for record in given if isinstance(record, kind)]
    assert counts == {"accepted": 40, "done": 20, "error": 20}
