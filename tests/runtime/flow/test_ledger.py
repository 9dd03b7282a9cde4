"""The ledger counts requests by identity, whatever their ids, copies and order of ending."""

from __future__ import annotations

from copy import copy

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from sageLLM.errors import FlowError
from sageLLM.records import DeadLetter, Request
from sageLLM.runtime.flow.ledger import Ledger, Outcome, outcome_of


def request() -> Request:
    return Request("same id", prompt="p")


def test_settling_twice_counts_once_and_tells_once():
    ledger, told = Ledger(), []
    ledger.on_settled(told.extend)
    one = request()
    ledger.accept([one])
    ledger.settle([(one, Outcome.DONE)])
    ledger.settle([(one, Outcome.ERROR)])
    assert told == [(one, Outcome.DONE)]
    assert ledger.counters() == {
        "accepted": 1, "done": 1, "cancelled": 0, "shed": 0, "error": 0, "in_flight": 0, "filtered": 0
    }  # fmt: skip


def test_a_request_never_accepted_is_not_counted():
    ledger = Ledger()
    ledger.settle([(request(), Outcome.DONE)])
    assert not any(ledger.counters().values())


@pytest.mark.parametrize("order", [[Outcome.DONE, Outcome.SHED, Outcome.CANCELLED], [Outcome.ERROR, Outcome.DONE] * 2])
def test_the_worst_of_several_records_counts(order):
    ledger = Ledger()
    one = request()
    ledger.accept([one])
    ledger.fork(one, len(order) - 1)
    for outcome in order:
        assert ledger.is_open(one)
        ledger.settle([(one, outcome)])
    assert not ledger.is_open(one)
    worst = max(order, key=list(Outcome).index)
    assert ledger.counters()[worst] == 1


def test_a_copied_request_is_told_for_each_object_when_that_ends():
    ledger, told = Ledger(), []
    ledger.on_settled(told.extend)
    one = request()
    twin = copy(one)
    ledger.accept([one])
    ledger.fork_request(one, twin)
    ledger.settle([(one, Outcome.ERROR)])
    assert told == [(one, Outcome.ERROR)] and ledger.counters()["in_flight"] == 1
    ledger.settle([(one, Outcome.DONE)])  # has ended: nothing happens
    ledger.settle([(twin, Outcome.DONE)])
    assert told == [(one, Outcome.ERROR), (twin, Outcome.DONE)]
    assert ledger.counters()["error"] == 1 and ledger.counters()["in_flight"] == 0


def test_a_copied_request_has_ended_once_all_its_copies_have_and_then_is_told_once():
    ledger, one, plain = Ledger(), request(), request()
    told = []
    ledger.on_ended(told.extend)
    ledger.accept([one, plain])
    twin = copy(one)
    ledger.fork_request(one, twin)
    ledger.settle([(one, Outcome.ERROR), (plain, Outcome.DONE)])
    assert told == [(plain, Outcome.DONE)]
    ledger.settle([(twin, Outcome.DONE)])
    assert told == [(plain, Outcome.DONE), (one, Outcome.ERROR)]


def test_the_copies_of_a_request_are_those_that_are_in_flight():
    ledger, one, other = Ledger(), request(), request()
    ledger.accept([one, other])
    assert ledger.copies_of(one) == [one]
    twin = copy(one)
    ledger.fork_request(one, twin)
    assert ledger.copies_of(one) == ledger.copies_of(twin) == [one, twin]
    ledger.settle([(one, Outcome.DONE)])
    assert ledger.copies_of(one) == ledger.copies_of(twin) == [twin]
    assert ledger.copies_of(other) == [other]
    ledger.settle([(twin, Outcome.DONE), (other, Outcome.DONE)])
    assert ledger.copies_of(one) == ledger.copies_of(other) == []


def test_what_is_refused_for_want_of_room_is_accepted_and_shed():
    ledger = Ledger()
    ledger.accept_shed(3)
    ledger.check()
    assert (ledger.accepted, ledger.counters()["shed"]) == (3, 3)


def test_the_dead_letter_of_a_cancelled_request_counts_as_cancelled():
    one = request()
    assert outcome_of(DeadLetter("gone", request=one)) is Outcome.ERROR
    one.cancelled = True
    assert outcome_of(DeadLetter("gone", request=one)) is Outcome.CANCELLED


def test_books_that_do_not_balance_are_found():
    ledger = Ledger()
    ledger.accept([request()])
    ledger.accepted += 1
    with pytest.raises(FlowError, match="does not balance"):
        ledger.check()


class Books(RuleBasedStateMachine):
    """Against a model that keeps, for each accepted request, a list of what has become of each of its records."""

    requests = Bundle("requests")

    def __init__(self):
        super().__init__()
        self.ledger = Ledger()
        self.families: list[dict] = []
        self.family_of: dict[int, tuple[dict, Request]] = {}

    def live(self, one):
        family = self.family_of[id(one)][0]
        return family["live"].get(id(one), 0)

    @rule(target=requests)
    def accept(self):
        one = request()
        family = {"live": {id(one): 1}, "outcomes": []}
        self.families.append(family)
        self.family_of[id(one)] = (family, one)
        self.ledger.accept([one])
        return one

    @rule(one=requests, extra=st.integers(1, 3))
    def fork(self, one, extra):
        if self.live(one):
            self.family_of[id(one)][0]["live"][id(one)] += extra
        self.ledger.fork(one, extra)

    @rule(target=requests, one=requests)
    def fork_request(self, one):
        twin = copy(one)
        family = self.family_of[id(one)][0]
        self.family_of[id(twin)] = (family, twin)
        if self.live(one):
            family["live"][id(twin)] = 1
        self.ledger.fork_request(one, twin)
        return twin

    @rule(one=requests, outcome=st.sampled_from(list(Outcome)))
    def settle(self, one, outcome):
        if self.live(one):
            family = self.family_of[id(one)][0]
            family["live"][id(one)] -= 1
            family["outcomes"].append(outcome)
        self.ledger.settle([(one, outcome)])

    @invariant()
    def balances(self):
        self.ledger.check()
        counts = self.ledger.counters()
        ended = [family for family in self.families if not any(family["live"].values())]
        assert counts["in_flight"] == len(self.families) - len(ended)
        for outcome in Outcome:
            worst = [max(family["outcomes"], key=list(Outcome).index) for family in ended]
            assert counts[outcome] == worst.count(outcome)
        for family, one in self.family_of.values():
            assert self.ledger.is_open(one) == bool(family["live"].get(id(one)))

    def teardown(self):
        self.ledger.fail_all()
        self.ledger.check()
        assert self.ledger.counters()["in_flight"] == 0


TestBooks = Books.TestCase
