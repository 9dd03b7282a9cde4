"""Computed KV on its way to another worker's pool: layer by layer, and when something goes wrong."""

from __future__ import annotations

from threading import Event

import numpy as np
import pytest
import torch

from sageLLM.config import KVGranularity
from sageLLM.runtime.scheduler.plan import KVExport
from sageLLM.runtime.worker import kv_sender
from sageLLM.runtime.worker.kv_sender import KVSender

LAYERS, SIZE = 3, 4


@pytest.fixture
def make_sender():
    senders = []

    def make(unit=KVGranularity.LAYER, timeout_s=0.0):
        pool = torch.randn(6, LAYERS, 2, 2, SIZE, 8)
        peers = [torch.zeros(5, LAYERS, 2, 2, SIZE, 8) for _ in range(2)]
        senders.append(KVSender(pool, peers, unit, timeout_s))
        return senders[-1], pool, peers

    yield make
    for sender in senders:
        sender.close()


@pytest.fixture
def export():
    def make(ends, peer=1, start=2, end=10):
        ids = np.array([5, 0, 3], np.int32), np.array([1, 4, 2], np.int32)
        return KVExport(0, 0, peer, start, end, *ids, lambda: ends.append(peer))

    return make


def send(sender, exports, computed=True):
    sending = sender.begin(exports)
    for layer in range(LAYERS):
        sending.send_layer(layer)
    sending.end(computed)
    return sending


@pytest.mark.parametrize("unit", KVGranularity)
def test_each_export_arrives_in_its_peers_pool(make_sender, export, unit):
    sender, pool, peers = make_sender(unit)
    ended = []
    assert send(sender, [export(ended, 0), export(ended, 1)]).failed() == {}
    assert ended == [0, 1]
    for peer in peers:
        sent, kept = peer[[1, 4, 2]], pool[[5, 0, 3]]
        flat = [kv.permute(1, 2, 3, 0, 4, 5).reshape(LAYERS, 2, 2, 3 * SIZE, 8) for kv in (sent, kept)]
        assert torch.equal(flat[0][..., 2:10, :], flat[1][..., 2:10, :])


def test_a_layer_is_sent_while_the_next_one_is_computed(make_sender, export):
    sender, pool, peers = make_sender()
    sending = sender.begin([export([])])
    sending.send_layer(0)
    sender.submit(lambda: None).result()  # what was submitted before is done
    assert torch.equal(peers[1][4, 0], pool[0, 0])
    assert not peers[1][4, 1:].any()
    sending.end(computed=False)
    assert sending.failed() == {}


def test_a_copy_that_fails_fails_its_export_alone(make_sender, export, monkeypatch):
    sender, pool, peers = make_sender()
    copy = kv_sender.copy_kv

    def stumble(unit, source, target, *rest):
        if target is peers[0] and rest[-1] == 1:
            raise RuntimeError("no more memory")
        copy(unit, source, target, *rest)

    monkeypatch.setattr(kv_sender, "copy_kv", stumble)
    ended = []
    assert send(sender, [export(ended, 0), export(ended, 1)]).failed() == {0: "RuntimeError: no more memory"}
    assert ended == [0, 1]
    assert torch.equal(peers[1][4], pool[0])


def test_a_copy_that_takes_too_long_has_failed_and_holds_its_blocks_until_it_ends(make_sender, export, monkeypatch):
    sender, _, _ = make_sender(timeout_s=0.05)
    go_on = Event()
    monkeypatch.setattr(kv_sender, "copy_kv", lambda *arguments: go_on.wait())
    ended = []
    assert send(sender, [export(ended)]).failed() == {0: "the transfer took more than 0.05 s"}
    assert ended == []
    go_on.set()
    sender.close()
    assert ended == [1]


def test_a_step_that_fails_sends_no_more_and_ends_its_exports(make_sender, export):
    sender, _, peers = make_sender(KVGranularity.TOKEN)
    ended = []
    assert send(sender, [export(ended)], computed=False).failed() == {}
    assert ended == [1]
    assert not peers[1].any()
