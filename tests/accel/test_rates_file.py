"""Rates on disk: found again for the same key, and never read wrong."""

from __future__ import annotations

import json
import threading

import pytest

from sageLLM.accel.rates_file import RatesFile, cache_folder

KEY = {"device": "abacus", "threads": 2, "shape": {"layers": 4}}


def test_what_was_written_is_read(tmp_path, rates):
    RatesFile(KEY, tmp_path).write(rates)
    assert RatesFile(dict(KEY), tmp_path).read() == rates
    assert [path.name for path in tmp_path.iterdir()] == [RatesFile(KEY, tmp_path).path.name], "no draft is left"


def test_another_key_finds_nothing(tmp_path, rates):
    RatesFile(KEY, tmp_path).write(rates)
    assert RatesFile({**KEY, "threads": 3}, tmp_path).read() is None


@pytest.mark.parametrize("keep", [0, 1, 20, 200, -1])
def test_a_torn_file_counts_as_none(tmp_path, rates, keep):
    file = RatesFile(KEY, tmp_path)
    file.write(rates)
    file.path.write_bytes(file.path.read_bytes()[:keep])
    assert file.read() is None


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(key={"device": "another"}),
        lambda data: data["rates"]["operations"]["ffn"].update(bytes_per_s=-1),
        lambda data: data["rates"]["operations"].update(tea={}),
        lambda data: data["rates"].pop("links"),
        lambda data: data.update(rates=[]),
    ],
)
def test_a_foreign_file_counts_as_none(tmp_path, rates, change):
    file = RatesFile(KEY, tmp_path)
    file.write(rates)
    data = json.loads(file.path.read_text())
    change(data)
    file.path.write_text(json.dumps(data))
    assert file.read() is None


def test_nowhere_to_write_is_a_warning(tmp_path, rates, caplog):
    (tmp_path / "occupied").write_text("")
    file = RatesFile(KEY, tmp_path / "occupied")
    file.write(rates)
    assert "cannot be kept" in caplog.text
    assert file.read() is None


def test_writers_at_once_leave_a_whole_file(tmp_path, rates):
    file = RatesFile(KEY, tmp_path)
    threads = [threading.Thread(target=file.write, args=(rates,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.read() == rates
    assert len(list(tmp_path.iterdir())) == 1


def test_the_folder_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "sagellm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "sagellm"
