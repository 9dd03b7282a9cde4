"""Bearer keys: whose it is, what it may do, and that nothing shows it."""

from __future__ import annotations

import hashlib
import traceback

import pytest

from sageLLM.errors import ConfigError
from sageLLM.operators.sources.net.keys import KeyRing, KeysConfig, TokenBucket, bearer_of

SECRET = "hunter2-very-secret"


@pytest.fixture
def clock():
    class Clock:
        now = 100.0

        def __call__(self):
            return self.now

    return Clock()


@pytest.fixture
def load(tmp_path, clock):
    def make(text):
        (tmp_path / "keys.yaml").write_text(text)
        return KeyRing.load(KeysConfig(keys="keys.yaml"), tmp_path, clock)

    return make


def test_without_a_file_nobody_is_asked(tmp_path, clock):
    assert not KeyRing.load(KeysConfig(), tmp_path, clock).is_required


def test_a_key_in_plain_by_its_hash_or_from_the_environment(load, monkeypatch):
    monkeypatch.setenv("CAROL_KEY", "c-secret")
    ring = load(f"""
- {{key: a-secret, name: alice}}
- {{key_sha256: {hashlib.sha256(b"b-secret").hexdigest()}, name: bob, tenant: team}}
- {{key_env: CAROL_KEY, name: carol, tenant: ""}}
""")
    found = [ring.authenticate(f"{name}-secret") for name in "abc"]
    assert [(key.name, key.tenant) for key in found] == [("alice", "alice"), ("bob", "team"), ("carol", "")]
    assert [ring.authenticate(wrong) for wrong in ("", "a-secre", "a-secret ", "A-SECRET", "\udc80")] == [None] * 5


def test_requests_per_minute(load, clock):
    key = load("- {key: k, name: k, requests_per_minute: 2}").authenticate("k")
    for _ in range(2):
        assert key.find_limit() is None
        key.begin()
        key.end(0)
    assert key.find_limit() == ("the key may send 2 requests per minute", pytest.approx(30))
    clock.now += 29.9
    assert key.find_limit() is not None
    clock.now += 0.2
    assert key.find_limit() is None


def test_tokens_are_counted_when_they_are_known_and_a_debt_is_waited_for(load, clock):
    key = load("- {key: k, name: k, tokens_per_minute: 60}").authenticate("k")
    key.begin()
    key.end(90)
    assert key.find_limit() == ("the key may use 60 tokens per minute", pytest.approx(30))
    clock.now += 31
    assert key.find_limit() is None


def test_requests_in_flight(load):
    key = load("- {key: k, name: k, max_in_flight: 1}").authenticate("k")
    key.begin()
    assert "1 requests in flight" in key.find_limit()[0]
    key.end(5)
    assert key.find_limit() is None


def test_a_bucket_holds_a_minute_at_most(clock):
    bucket = TokenBucket(60, clock)
    clock.now += 10_000
    assert bucket.time_until(60) == 0
    assert bucket.time_until(61) == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "write a list of keys"),
        (f"key: {SECRET}", "write a list of keys"),
        (f"- {SECRET}", "key 1: write a mapping"),
        (f"- {{key: {SECRET}", r"keys\.yaml:\d+:\d+: is not YAML"),
        (f"- {{key: {SECRET}}}", "key 1: field 'name': Field required"),
        (f"- {{nam: a, key: {SECRET}}}", "key 1: there is no field 'nam'; did you mean 'name'"),
        (f"- {{key: [{SECRET}], name: a}}", "key 1: field 'key': Input should be a valid string"),
        (f"- {{key_sha256: {SECRET}, name: a}}", "key 1: field 'key_sha256': String should match"),
        (f"- {{key: {SECRET}, key_env: A, name: a}}", r"key 1 \(a\): found key and key_env of .* exactly one"),
        ("- {name: a}", "found none of key, key_sha256, key_env"),
        ("- {name: a, key_env: NOT_THERE}", "the environment has no NOT_THERE"),
        (f"- {{key: {SECRET}, name: a}}\n- {{key: {SECRET}, name: b}}", r"key 2 \(b\) stands there twice"),
        (f"- {{key: {SECRET}, name: a}}\n- {{key: b, name: a}}", "the name 'a' is taken"),
        (f"- {{key: {SECRET}, name: a, max_in_flight: 0}}", "field 'max_in_flight'"),
    ],
)
def test_a_wrong_file_says_what_is_wrong_and_shows_no_key(load, text, told):
    with pytest.raises(ConfigError, match=told) as caught:
        load(text)
    assert SECRET not in "".join(traceback.format_exception_only(caught.value))
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def test_a_file_that_is_not_there(tmp_path, clock):
    with pytest.raises(ConfigError, match=r"keys\.yaml: cannot be read: No such file"):
        KeyRing.load(KeysConfig(keys="keys.yaml"), tmp_path, clock)


def test_nothing_that_is_printed_shows_a_key(load):
    ring = load(f"- {{key: {SECRET}, name: alice}}")
    key = ring.authenticate(SECRET)
    assert SECRET not in repr(ring) + repr(key) + repr(vars(ring)) + repr(vars(key))


@pytest.mark.parametrize(
    ("header", "key"),
    [("Bearer k", "k"), ("bearer  k ", "k"), ("Basic k", None), ("Bearer", None), ("k", None), ("", None)],
)
def test_the_authorization_that_is_a_bearer_key(header, key):
    assert bearer_of(header) == key
