"""A write costs as much as several tokens: what belongs together goes out together, and the first token at once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sageLLM.operators.sources.openai.connection import _Transport
from sageLLM.operators.sources.openai.service import Service


class Written(list):
    def write(self, data):
        self.append(data)

    def is_closing(self):
        return False


class Loop:
    """An event loop whose time is told."""

    def __init__(self):
        self.now = 100.0
        self.called = []  # (when, function, arguments)

    def time(self):
        return self.now

    def call_soon(self, function, *arguments):
        self.called.append((self.now, function, arguments))

    def call_at(self, when, function, *arguments):
        self.called.append((when, function, arguments))

    def go_on(self):
        """Call what waits, when it is time; returns when that was."""
        when, function, arguments = self.called.pop(0)
        self.now = max(self.now, when)
        function(*arguments)
        return when


@pytest.fixture
def service():
    engine = SimpleNamespace(config=SimpleNamespace(model=SimpleNamespace(model_id="null")))
    return Service(SimpleNamespace(model_name=None), engine, None)


def pushing(loop, seconds):
    """A stream, pushing whose news takes so long."""

    def push_or_wake():
        loop.now += seconds

    return SimpleNamespace(push_or_wake=push_or_wake)


def test_a_head_goes_out_with_its_body():
    written = Written()
    transport = _Transport(written)
    transport.keeps = True
    transport.write(b"head ")
    assert written == []
    transport.write(b"body")
    transport.write(b"more")
    assert written == [b"head body", b"more"]
    assert not transport.is_closing()


def test_what_is_new_in_a_turn_is_pushed_together_and_at_once(service):
    loop = Loop()
    for _ in range(3):
        service.push_soon(pushing(loop, 0), loop)
    assert len(loop.called) == 1 and loop.go_on() == 100.0


def test_pushing_takes_a_quarter_of_the_time_at_most(service):
    loop = Loop()
    for _ in range(4):
        service.push_soon(pushing(loop, 0.001), loop)
    loop.go_on()
    service.push_soon(pushing(loop, 0.001), loop)
    service.push_soon(pushing(loop, 0.001), loop)
    assert len(loop.called) == 1 and loop.go_on() == pytest.approx(100.004 + 0.012)
    loop.now += 0.1
    service.push_soon(pushing(loop, 0.001), loop)
    assert loop.go_on() == loop.now - 0.001


def test_nobody_waits_longer_than_twenty_milliseconds(service):
    loop = Loop()
    service.push_soon(pushing(loop, 1.0), loop)
    loop.go_on()
    service.push_soon(pushing(loop, 1.0), loop)
    assert loop.go_on() == pytest.approx(101.02)
