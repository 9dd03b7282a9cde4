"""A write costs as much as several tokens: what belongs together goes out together."""

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


@pytest.fixture
def service():
    engine = SimpleNamespace(config=SimpleNamespace(model=SimpleNamespace(model_id="null")))
    return Service(SimpleNamespace(model_name=None), engine, None)


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
    turns, pushed = [], []
    loop = SimpleNamespace(call_soon=turns.append)
    for stream in range(3):
        service.push_soon(SimpleNamespace(push_or_wake=lambda stream=stream: pushed.append(stream)), loop)
    assert pushed == []
    (turn,) = turns
    turn()
    assert pushed == [0, 1, 2]
