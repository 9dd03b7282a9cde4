"""IntervalSync: a file reaches the disk about a second after it was written, and stopping never waits for ever."""

from __future__ import annotations

import os
import threading

import pytest

from sageLLM.operators.sinks import interval_sync
from sageLLM.operators.sinks.interval_sync import IntervalSync


@pytest.fixture
def syncs(monkeypatch):
    """Sets an event at each fsync; the interval is short."""
    happened = threading.Event()
    monkeypatch.setattr(interval_sync, "INTERVAL_S", 0.001)
    monkeypatch.setattr(os, "fsync", lambda fd: happened.set())
    return happened


def test_what_was_written_is_synced(syncs):
    syncer = IntervalSync(0)
    syncer.written()
    assert syncs.wait(20)
    syncer.stop()


def test_a_stop_that_comes_just_before_the_flag_is_cleared_is_heard(syncs):
    syncer = IntervalSync(0)
    clear, stopping = syncer._dirty.clear, []

    def clear_late():
        if not stopping:
            stopping.append(threading.Thread(target=syncer.stop, daemon=True))
            stopping[0].start()
            assert syncer._stopped.wait(20)
            while not syncer._dirty.is_set():
                pass
        clear()

    syncer._dirty.clear = clear_late
    syncer.written()
    syncer._thread.join(20)
    assert not syncer._thread.is_alive()


def test_a_failed_sync_is_told_at_the_next_write(monkeypatch, syncs):
    def fail(fd):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    syncer = IntervalSync(0)
    syncer.written()
    syncer._thread.join(20)
    with pytest.raises(OSError, match="no space left"):
        syncer.written()
    syncer.stop()
