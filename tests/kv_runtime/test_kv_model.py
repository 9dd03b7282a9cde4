"""The cache against a model that remembers every committed prefix and every token's KV written to every block."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sageLLM.kv_runtime import (
    Commit,
    KVCache,
    KVEventLog,
    KVEviction,
    Want,
    block_hashes,
    make_eviction_policy,
    pool,
)

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=14)
NAMESPACES = st.sampled_from([("", ""), ("a", ""), ("", "a")])


def as_tokens(tokens):
    return np.array(tokens, dtype=np.int32)


@dataclass(eq=False)
class Owner:
    namespace: tuple[str, str]
    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    computed: int = 0


class CacheMachine(RuleBasedStateMachine):
    """Sequences live as in the worker. KV is modelled as "all tokens up to here", the one thing that it depends on."""

    eviction = KVEviction.LRU

    @initialize(
        num_blocks=st.sampled_from([8, 16, 400]), block_size=st.sampled_from([1, 3, 4]), ttl_s=st.sampled_from([0, 9])
    )
    def make(self, num_blocks, block_size, ttl_s):
        policy = make_eviction_policy(self.eviction, attention_parity=4)
        self.cache = KVCache(num_blocks, block_size, policy=policy, ttl_s=ttl_s, clock=lambda: self.now)
        self.log = KVEventLog(num_blocks, block_size, 10**6)
        self.cache.listen(self.log)
        self.told = set()  # (tenant, hash) of every full block that is cached, by the events
        self.ttl_s = ttl_s
        self.now = 0.0
        self.size = block_size
        self.kv = {}  # (block, offset) -> (namespace, tokens up to and including that position)
        self.committed = {}  # namespace -> every prefix ever committed
        self.owners = []
        self.held = []  # blocks of matches that are released late
        self.pinned = {}  # namespace -> tokens of every pinned prefix
        self.lossless = True  # nothing was evicted yet, so every committed prefix must be found
        self.hits = self.hit_tokens = self.queries = self.queried = self.inserted = 0

    def expected(self, tokens, namespace):
        known = self.committed.get(namespace, set())
        return max((n for n in range(1, len(tokens) + 1) if tuple(tokens[:n]) in known), default=0)

    def longest_pinned(self, tokens, namespace):
        pins = self.pinned.get(namespace, ())
        return max((n for n in range(1, len(tokens) + 1) for pin in pins if pin[:n] == tuple(tokens[:n])), default=0)

    def match(self, tokens, namespace, limit, record=True):
        found = self.cache.match(as_tokens(tokens), namespace, limit, record=record)
        asked = tokens[:limit] if limit > 0 else []
        bound = self.expected(asked, namespace)
        assert found.tokens >= self.longest_pinned(asked, namespace)
        assert found.tokens == bound if self.lossless else found.tokens <= bound
        assert found.blocks.dtype == np.int32
        assert found.blocks.size == -(-found.tokens // self.size)
        for p in range(found.tokens):
            key = (int(found.blocks[p // self.size]), p % self.size)
            assert self.kv[key] == (namespace, tuple(tokens[: p + 1])), f"wrong KV at position {p}"
        if record:
            self.queries += 1
            self.queried += len(tokens)
            self.hits += found.tokens > 0
            self.hit_tokens += found.tokens
        return found

    def allocate(self, count):
        before, available = self.cache.num_free, self.cache.available()
        blocks = self.cache.allocate(count)
        if blocks is None:
            assert count > available
            assert (before, available) == (self.cache.num_free, self.cache.available())
            return None
        assert count <= available
        assert blocks.size == count == len(set(blocks.tolist()))
        self.lossless = self.lossless and count <= before
        return blocks

    def compute(self, owner, upto):
        for p in range(owner.computed, upto):
            self.kv[owner.blocks[p // self.size], p % self.size] = (owner.namespace, tuple(owner.tokens[: p + 1]))
        owner.computed = upto

    def commit(self, owner):
        tokens = owner.tokens[: owner.computed]
        known = self.expected(tokens, owner.namespace)
        inserted = self.cache.commit(as_tokens(tokens), as_tokens(owner.blocks), owner.namespace)
        assert inserted == len(tokens) - known if self.lossless else inserted >= len(tokens) - known
        self.inserted += inserted
        prefixes = self.committed.setdefault(owner.namespace, set())
        prefixes.update(tuple(tokens[:n]) for n in range(1, len(tokens) + 1))
        found = self.match(tokens, owner.namespace, len(tokens))
        assert found.tokens == len(tokens), "just committed, with owners: must be found"
        self.cache.release(found.blocks)

    @precondition(lambda self: self.owners)
    @rule()
    def commit_everybody(self):
        commits = [
            Commit(as_tokens(owner.tokens[: owner.computed]), as_tokens(owner.blocks), owner.namespace)
            for owner in self.owners
        ]
        self.inserted += self.cache.commit_all(commits)
        for owner in self.owners:
            tokens = owner.tokens[: owner.computed]
            prefixes = self.committed.setdefault(owner.namespace, set())
            prefixes.update(tuple(tokens[:n]) for n in range(1, len(tokens) + 1))
            (cached,) = self.cache.count_cached([(as_tokens([*tokens, 0]), owner.namespace)])
            assert cached == len(tokens), "just committed, with owners: must be found"

    @rule(tokens=TOKENS, namespace=NAMESPACES)
    def start(self, tokens, namespace):
        found = self.match(tokens, namespace, len(tokens) - 1)
        owner = Owner(namespace, tokens, found.blocks.tolist(), found.tokens)
        if found.tokens % self.size:
            copy = self.allocate(1)
            if copy is None:
                self.cache.release(found.blocks)
                return
            shared = owner.blocks[-1]
            for offset in range(self.size):
                if (shared, offset) in self.kv:
                    self.kv[int(copy[0]), offset] = self.kv[shared, offset]
            owner.blocks[-1] = int(copy[0])
            self.cache.release(found.blocks[-1:])
        rest = self.allocate(-(-len(tokens) // self.size) - len(owner.blocks))
        if rest is None:
            self.cache.release(as_tokens(owner.blocks))
            return
        owner.blocks += rest.tolist()
        self.owners.append(owner)

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), commit=st.booleans())
    def prefill(self, data, commit):
        owner = data.draw(st.sampled_from(self.owners))
        self.compute(owner, data.draw(st.integers(owner.computed, len(owner.tokens))))
        if commit:
            self.commit(owner)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def pin(self, data):
        owner = data.draw(st.sampled_from(self.owners))
        self.compute(owner, len(owner.tokens))
        self.commit(owner)
        blocks, before = -(-owner.computed // self.size), self.cache.num_pinned
        commit = Commit(as_tokens(owner.tokens), as_tokens(owner.blocks), owner.namespace, pin=True)
        assert self.cache.commit_all([commit, commit]) == 0
        self.pinned.setdefault(owner.namespace, set()).add(tuple(owner.tokens))
        assert self.cache.num_pinned <= before + blocks

    @precondition(lambda self: any(self.pinned.values()))
    @rule(data=st.data())
    def unpin(self, data):
        pins = [(namespace, tokens) for namespace, pinned in self.pinned.items() for tokens in sorted(pinned)]
        namespace, tokens = data.draw(st.sampled_from(pins))
        assert self.cache.unpin(as_tokens(tokens), namespace)
        assert not self.cache.unpin(as_tokens(tokens), namespace)
        self.pinned[namespace].remove(tokens)

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), tokens=TOKENS, commit=st.booleans())
    def decode(self, data, tokens, commit):
        owner = data.draw(st.sampled_from(self.owners))
        for token in tokens:
            if len(owner.tokens) == len(owner.blocks) * self.size:
                more = self.allocate(1)
                if more is None:
                    break
                owner.blocks += more.tolist()
            owner.tokens = owner.tokens + [token]
        self.compute(owner, len(owner.tokens))
        if commit:
            self.commit(owner)

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), commit=st.booleans())
    def finish(self, data, commit):
        owner = data.draw(st.sampled_from(self.owners))
        if commit:
            self.commit(owner)
        self.cache.release(as_tokens(owner.blocks))
        self.owners.remove(owner)

    @precondition(lambda self: len(self.owners) > 1)
    @rule()
    def finish_all_at_once(self):
        self.cache.release(np.concatenate([as_tokens(owner.blocks) for owner in self.owners]))
        self.owners.clear()

    @rule(tokens=TOKENS, namespace=NAMESPACES, limit=st.integers(-1, 14), record=st.booleans())
    def look(self, tokens, namespace, limit, record):
        found = self.match(tokens, namespace, limit, record)
        self.cache.retain(found.blocks)
        self.cache.release(np.concatenate([found.blocks, found.blocks]))

    @rule(data=st.data(), namespace=NAMESPACES)
    def look_and_hold(self, data, namespace):
        known = sorted(self.committed.get(namespace, ())) or [(0,)]
        tokens = list(data.draw(st.sampled_from(known)))
        self.held.append(self.match(tokens, namespace, len(tokens)).blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release_late(self, data):
        self.cache.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    def owned(self):
        return [as_tokens(owner.blocks) for owner in self.owners] + self.held

    @rule()
    def take_everything(self):
        blocks = self.allocate(self.cache.available())
        self.cache.check_integrity([*self.owned(), blocks])
        assert self.allocate(1) is None
        self.cache.release(blocks)

    @precondition(lambda self: self.cache.available())
    @rule(data=st.data())
    def take_some(self, data):
        """Evicts in small pieces, between which the tree lives on."""
        self.cache.release(self.allocate(data.draw(st.integers(1, self.cache.available()))))

    @rule(seconds=st.integers(1, 8))
    def pass_time(self, seconds):
        self.now += seconds
        self.lossless = self.lossless and not self.ttl_s

    @precondition(lambda self: self.ttl_s)
    @rule(seconds=st.integers(0, 3))
    def idle_until_everything_has_expired(self, seconds):
        self.now += self.ttl_s + seconds
        self.committed = {
            namespace: {pin[:n] for pin in pins for n in range(1, len(pin) + 1)}
            for namespace, pins in self.pinned.items()
        }
        self.lossless = True
        assert self.cache.count_cached([(as_tokens([0, 0]), ("", ""))]) == [self.expected([0], ("", ""))]
        assert self.cache.stats().cached_blocks == self.cache.num_pinned

    @rule()
    def clear(self):
        self.cache.clear()
        self.committed.clear()
        self.pinned.clear()
        assert self.cache.num_pinned == 0
        self.lossless = True

    @rule()
    def read_events(self):
        for event in self.log.take():
            blocks = {(event.tenant, name) for name in event.block_hashes}
            assert blocks.isdisjoint(self.told) if event.kind == "stored" else blocks <= self.told
            self.told = set() if event.kind == "cleared" else self.told ^ blocks
        cached = set()
        for node in self.cache._tree.nodes():
            (tenant, salt), tokens = node.prefix()
            cached |= {(tenant, name) for name in block_hashes(tokens, self.size, tenant, salt)}
        assert self.told == cached

    @rule(prompts=st.lists(st.tuples(TOKENS, NAMESPACES), min_size=1, max_size=3))
    def acquire_and_give_back(self, prompts):
        before, available = self.cache.num_free, self.cache.available()
        acquired = self.cache.acquire([Want(as_tokens(t), namespace, len(t) - 1) for t, namespace in prompts])
        taken = []
        for (tokens, namespace), (match, fresh) in zip(prompts, acquired, strict=False):
            for p in range(match.tokens):
                key = (int(match.blocks[p // self.size]), p % self.size)
                assert self.kv[key] == (namespace, tuple(tokens[: p + 1])), f"wrong KV at position {p}"
            assert match.tokens // self.size + fresh.size == -(-len(tokens) // self.size)
            taken += [match.blocks, fresh]
            self.queries += 1
            self.queried += len(tokens)
            self.hits += match.tokens > 0
            self.hit_tokens += match.tokens
        fresh = sum(fresh.size for _, fresh in acquired)
        assert fresh <= available
        assert len(acquired) == len(prompts) or fresh + -(-len(prompts[len(acquired)][0]) // self.size) > before
        self.lossless = self.lossless and fresh <= before
        if taken:
            self.cache.release(np.concatenate(taken))

    @rule()
    def find_everything(self):
        for namespace, prefixes in self.committed.items():
            for tokens in [p for p in prefixes if not any(q[: len(p)] == p and q != p for q in prefixes)]:
                self.cache.release(self.match(list(tokens), namespace, len(tokens)).blocks)

    @invariant()
    def books_balance(self):
        self.cache.check_integrity(self.owned())
        owned = {block for blocks in self.owned() for block in blocks.tolist()}
        if not any(self.pinned.values()):
            assert self.cache.num_pinned == 0
        owned |= set(np.flatnonzero(self.cache._tree.pins.counts).tolist())
        assert self.cache.available() == self.cache.num_blocks - len(owned)
        assert self.cache.usage() == pytest.approx(len(owned) / self.cache.num_blocks)
        stats = self.cache.stats()
        assert (stats.queries, stats.queried_tokens) == (self.queries, self.queried)
        assert (stats.hits, stats.hit_tokens) == (self.hits, self.hit_tokens)
        assert stats.committed_tokens == self.inserted

    def teardown(self):
        if not hasattr(self, "cache"):
            return
        for blocks in self.owned():
            self.cache.release(blocks)
        self.cache.clear()
        assert self.cache.num_free == self.cache.num_blocks
        self.cache.check_integrity([])


@pytest.mark.parametrize("eviction", KVEviction)
@pytest.mark.parametrize("few", [0, pool.FEW], ids=["vectorised", "loops"])
def test_cache_behaves_like_its_model(monkeypatch, few, eviction):
    monkeypatch.setattr(pool, "FEW", few)
    machine = type("Machine", (CacheMachine,), {"eviction": eviction})
    run = machine.TestCase("runTest")
    run.settings = settings(
        max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run.runTest()
