"""Migration: what is hot and what is cold is known, and the watermarks are kept. Time is the test's own."""

from __future__ import annotations

import numpy as np
import pytest

from sageLLM.kv_runtime.tiers import Temperature, TemperatureClassifier, Watermarks
from sageLLM.kv_runtime.tiers.block_key import prefix_keys
from sageLLM.runtime.scheduler.lease import LeaseBook
from sageLLM.runtime.scheduler.policies import FirstComeFirstServed

ANYONE = ("", "")


class Time:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def simulate(classifier, time, rates, seconds, seed):
    """Poisson arrivals: `rates` are accesses per second of each key."""
    rng = np.random.default_rng(seed)
    events = []
    for key, rate in rates:
        count = rng.poisson(rate * seconds)
        events += [(at, key) for at in rng.uniform(0, seconds, count)]
    start = time.now
    for at, key in sorted(events, key=lambda event: event[0]):
        time.now = start + at
        classifier.access([key])
    time.now = start + seconds


@pytest.mark.parametrize("seed", range(5))
def test_more_than_nine_in_ten_are_classified_right(run, seed):
    time = Time()
    classifier = TemperatureClassifier(1.0, 60.0, time)
    keys = [prefix_keys(ANYONE, run(name, 4), 4)[0] for name in range(300)]
    sets = {Temperature.HOT: keys[:100], Temperature.WARM: keys[100:200], Temperature.COLD: keys[200:]}
    rng = np.random.default_rng(seed)
    hot = [(key, rng.uniform(1.5, 5)) for key in sets[Temperature.HOT]]
    warm = [(key, rng.uniform(0.1, 0.6)) for key in sets[Temperature.WARM]]
    simulate(classifier, time, [(key, 2.0) for key in sets[Temperature.COLD]], 30, seed)
    simulate(classifier, time, hot + warm, 120, seed + 100)
    right = sum(classifier.classify(key.digest) is expected for expected, keys in sets.items() for key in keys)
    assert right > 0.9 * 300


def test_at_the_limits(run):
    time = Time()
    classifier = TemperatureClassifier(1.0, 60.0, time)
    (key,) = prefix_keys(ANYONE, run(1, 4), 4)
    assert classifier.classify(key.digest) is Temperature.COLD
    for _ in range(100):
        time.now += 0.5
        classifier.access([key])
    assert classifier.classify(key.digest) is Temperature.HOT
    assert classifier.hot_keys() == [key]
    time.now += 30
    assert classifier.classify(key.digest) is Temperature.WARM
    time.now += 29.9
    assert classifier.classify(key.digest) is Temperature.WARM
    time.now += 0.2
    assert classifier.classify(key.digest) is Temperature.COLD
    classifier.forget_cold()
    assert not classifier._records


@pytest.fixture
def migrating(bed):
    def make(**options):
        time = Time()
        b = bed(classifier=TemperatureClassifier(1.0, 60.0, time), **options)
        b.time = time
        b.now = time.now
        b.clock = time
        return b

    return make


def ask(b, tokens):
    b.tiers.wish(np.asarray(tokens), ANYONE, len(tokens))


def test_the_pool_is_demoted_over_the_mark_and_down_to_the_other(migrating, run):
    b = migrating(blocks=40, host_blocks=100)
    migration = b.tiers.migration
    for name in range(9):
        ask(b, run(name, 16))
        b.time.now += 1
        b.compute(run(name, 16))
        migration.run()
        assert migration.usage() <= 0.9
    assert b.tiers.stats().ddr_blocks == 0, "90 % is not over 90 %"
    b.compute(run(9, 16))
    assert migration.usage() == 1.0
    ask(b, run(9, 16))
    migration.run()
    assert migration.usage() == pytest.approx(0.8)
    assert b.cached(run(0, 16)) == 16, "it stays in the pool until its room is needed"
    saved = b.tiers.stats().bytes_hbm_to_ddr
    assert saved == 8 * 32
    b.compute(run(10, 32))
    assert b.tiers.stats().bytes_hbm_to_ddr == saved, "the coldest had been saved: giving them up costs nothing"


def test_under_load_the_marks_are_kept(migrating):
    b = migrating(blocks=40, host_blocks=400)
    rng = np.random.default_rng(0)
    for _ in range(150):
        prompt = (1000 * min(rng.geometric(0.1), 30) + np.arange(4 * int(rng.integers(1, 10)))).astype(np.int32)
        ask(b, prompt)
        b.compute(prompt)
        b.time.now += 0.3
        b.work()
        if b.tiers.migration.usage() > 0.9:
            b.tiers.migration.run()
            assert b.tiers.migration.usage() <= 0.8


def test_hot_prefixes_come_up_while_there_is_room(migrating, run):
    b = migrating(blocks=40, host_blocks=100)
    for name in range(1, 7):
        b.compute(run(name, 32))
    held = b.kv.allocate(40)
    b.tiers.flush()
    b.kv.release(held)
    for _ in range(30):
        b.time.now += 0.4
        for name in (1, 2):
            ask(b, run(name, 32))
    ask(b, run(3, 32))
    b.tiers.migration.run()
    b.work()
    assert [b.cached(run(name, 32)) for name in (1, 2, 3)] == [32, 32, 0]
    assert b.kv.num_blocks - b.kv.num_free <= 0.5 * b.kv.num_blocks
    for name in (4, 5):
        for _ in range(30):
            b.time.now += 0.4
            ask(b, run(name, 32))
    b.tiers.migration.run()
    b.work()
    assert b.kv.num_blocks - b.kv.num_free <= 0.5 * b.kv.num_blocks


def test_ddr_is_written_to_files_over_the_mark(bed, run, tmp_path):
    b = bed(blocks=4, host_blocks=40, files=(tmp_path, bytes(32), 100), watermarks=Watermarks(0.5, 0.25, 0.2))
    for name in range(12):
        b.compute(run(name, 16))
        b.work()
        stats = b.tiers.stats()
        assert stats.ddr_blocks - stats.nvme_blocks <= 0.5 * 40
    assert b.tiers.stats().nvme_blocks > 0


def test_blocks_that_are_given_up_while_they_are_copied_down(migrating, run):
    b = migrating(blocks=8, host_blocks=16)
    b.compute(run(1, 32))
    unsaved, in_tree = b.tiers.write_back.unsaved()
    assert len(unsaved) == in_tree == 8
    b.compute(run(2, 32))
    b.tiers.write_back.copy_down(b.kv, unsaved)
    assert b.fetch(run(1, 32)) == 16


def test_who_misses_a_block_that_is_being_copied_down_waits_for_it_and_is_told(migrating, run, monkeypatch):
    b = migrating(blocks=8, host_blocks=16)
    book = LeaseBook(b.kv, 1, b.size, FirstComeFirstServed(), tiers=b.tiers)
    read, found = b.io.read, []

    def read_meanwhile(*arguments):
        found.append((b.kv.allocate(7), book.any_in_transit))
        read(*arguments)

    monkeypatch.setattr(b.io, "read", read_meanwhile)
    b.tiers.fetcher.on_fetched.append(lambda: found.append((b.kv.available(), book.any_in_transit)))
    b.compute(run(1, 32))
    b.tiers.migration.run()
    assert found == [(None, True), (8, False)]


def test_who_asked_is_forgotten_with_what_they_asked_for(migrating, run):
    b = migrating(blocks=40, host_blocks=100)
    for salt in range(5):
        b.compute(run(1, 8), ("", str(salt)))
        b.tiers.wish(run(1, 8), ("", str(salt)), 8)
        b.time.now += 20
    b.tiers.migration.run()
    assert set(b.tiers.migration._namespaces.values()) == {("", "3"), ("", "4")}
