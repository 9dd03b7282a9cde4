"""tee: every record on every edge, and each branch may change what it gets."""

from __future__ import annotations

from sageLLM.graph.operator_spec import RecordKind
from sageLLM.operators.tee import Tee
from sageLLM.records import DeadLetter, Request


def test_each_edge_gets_every_record_in_order(through):
    requests = [Request(str(n), messages=[{"role": "user", "content": "hi"}]) for n in range(5)]
    kept, counts = through(Tee, {}, requests, ["out", "out", "out"])
    for branch in kept.values():
        assert [record.request_id for record in branch] == ["0", "1", "2", "3", "4"]
    assert counts == {"accepted": 5, "done": 5}, "a request counts once, however many copies it has"


def test_a_branch_may_change_what_it_gets(through, make_completion):
    request = Request("r", messages=[{"role": "user", "content": "hi"}])
    completion = make_completion("c")
    kept, _ = through(Tee, {}, [request, completion], ["out", "out"])
    first, second = kept.values()
    first[0].messages[0]["content"] = first[1].choices[0].text = "changed"
    first[1].choices[0].output_tokens.append(9)
    assert second[0].messages[0]["content"] == "hi"
    assert (second[1].choices[0].text, second[1].choices[0].output_tokens) == ("four", [4, 5])


def test_dead_letters_are_copied_too(through):
    kept, counts = through(Tee, {}, [DeadLetter("not JSON")], ["out", "out"])
    assert [len(branch) for branch in kept.values()] == [1, 1]
    assert counts == {"accepted": 1, "error": 1}


def test_sequences_are_refused_because_they_own_kv_blocks():
    assert RecordKind.SEQUENCE not in Tee.inputs[0].kinds
