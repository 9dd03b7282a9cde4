"""NVME: files that outlive the process, and of which only whole and right ones are read."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from sageLLM.errors import ConfigError, KVCacheError
from sageLLM.kv_runtime.cache import Commit
from sageLLM.kv_runtime.tiers import FileTier, Watermarks, block_file
from sageLLM.kv_runtime.tiers.block_key import prefix_keys

ANYONE = ("", "")
PRINT = bytes(range(32))


@pytest.fixture
def tier(tmp_path):
    def make(fingerprint=PRINT, capacity=100, block_size=4):
        return FileTier(tmp_path, fingerprint, capacity, block_size, 32)

    return make


@pytest.fixture
def keys(run):
    return prefix_keys(ANYONE, run(1, 40), 4)


def data(number):
    return np.full(32, number, np.uint8)


def read(tier, key):
    into = np.zeros(32, np.uint8)
    tier.read(key, into)
    return into


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_another_process_reads_what_one_has_written(tier, keys):
    first = tier()
    for number, key in enumerate(keys):
        assert first.write(key, data(number))
    second = tier()
    assert len(second) == 10
    for number, key in enumerate(keys):
        assert key in second
        assert (read(second, key) == number).all()


def test_what_another_process_has_deleted_is_missed_and_written_again(tier, keys, bed, run):
    ours, theirs = tier(), tier()
    b = bed(blocks=8, files=ours)
    blocks = b.kv.allocate(2)
    assert b.tiers.export(run(1, 8), blocks, ANYONE) == 0
    assert all(map(theirs.discover, keys[:2]))
    theirs.shrink(0)
    assert b.tiers.export(run(1, 8), blocks, ANYONE) == 0
    assert all(map(tier().discover, keys[:2]))
    tier().shrink(0)
    assert not ours.discover(keys[0])
    assert keys[0] not in ours
    b.kv.release(blocks)


def test_what_comes_later_is_discovered(tier, keys):
    first, second = tier(), tier()
    first.write(keys[0], data(1))
    assert keys[0] not in second
    assert second.discover(keys[0])
    assert not second.discover(keys[1])
    assert (read(second, keys[0]) == 1).all()


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[:-5]
    elif how == "longer":
        content += b"x"
    elif how == "empty":
        content = b""
    elif how == "not ours":
        content[:8] = b"GIF89a\0\0"
    elif how == "another version":
        content[8] += 1
    else:
        content[int(how)] ^= 1
    path.write_bytes(content)


EVERY_BYTE = [str(at) for at in range(0, 144, 7)]


@pytest.mark.parametrize("how", ["truncated", "longer", "empty", "not ours", "another version", *EVERY_BYTE])
def test_a_damaged_file_is_never_read_as_kv(tier, keys, tmp_path, how):
    first = tier()
    first.write(keys[0], data(1))
    (path,) = files_of(tmp_path)
    assert path.stat().st_size == 144
    damage(path, how)
    restarted = tier()
    for tier_ in (first, restarted):
        if keys[0] in tier_:
            with pytest.raises((KVCacheError, OSError)):
                read(tier_, keys[0])
        assert keys[0] not in tier_
    assert tier().write(keys[0], data(2)), "it can be written again"
    assert (read(tier(), keys[0]) == 2).all()


def test_a_file_of_another_model_or_block_is_not_read(tier, keys, tmp_path):
    first, other = tier(), tier(fingerprint=bytes(32))
    first.write(keys[0], data(1))
    assert keys[0] not in tier(fingerprint=bytes(32))
    other.write(keys[1], data(2))
    paths = files_of(tmp_path)
    theirs, ours = (next(path for path in paths if each.hex() in str(path)) for each in (PRINT, bytes(32)))
    for key, source, target in ((keys[0], theirs, ours), (keys[1], theirs, ours)):
        path = target.parent.parent / key.digest.hex()[:2] / f"{key.digest.hex()}.kv"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(source.read_bytes())
        fresh = tier(fingerprint=bytes(32))
        with pytest.raises(KVCacheError, match="another block, or one of another model"):
            read(fresh, key)


def test_the_least_recently_used_are_deleted_also_after_a_restart(tier, keys, tmp_path):
    first = tier(capacity=6)
    deleted = []
    first.on_deleted.append(deleted.append)
    for number, key in enumerate(keys[:6]):
        first.write(key, data(number))
        path = next(path for path in files_of(tmp_path) if key.digest.hex() in path.name)
        os.utime(path, (number, number))
    read(first, keys[0])
    first.write(keys[6], data(6))
    assert deleted == [keys[1].digest]
    second = tier(capacity=6)
    second.write(keys[7], data(7))
    assert [key in second for key in keys[:8]] == [True, False, False, True, True, True, True, True]
    assert len(files_of(tmp_path)) == 6


def test_a_full_disk_makes_it_read_only_with_one_warning(tier, keys, tmp_path, monkeypatch, caplog):
    first = tier()
    first.write(keys[0], data(1))
    writev = os.writev

    def full(fd, parts):
        writev(fd, [parts[0]])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "writev", full)
    assert not first.write(keys[1], data(2))
    monkeypatch.undo()
    assert not first.write(keys[2], data(2)), "it stays so"
    assert caplog.text.count("no more KV is written") == 1
    assert (read(first, keys[0]) == 1).all()
    assert len(files_of(tmp_path)) == 1, "nothing is left of what was half written"


def test_a_short_write_is_a_full_disk(tier, keys, monkeypatch):
    monkeypatch.setattr(os, "writev", lambda fd, parts: 20)
    assert not tier().write(keys[0], data(1))


def test_a_folder_that_cannot_be_made_is_a_wrong_configuration(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^kv_cache.nvme_path: the folder .*/file/kv/.* cannot be made: Not a dir"):
        FileTier(tmp_path / "file" / "kv", PRINT, 10, 4, 32)


def test_what_is_kept_makes_no_room(tier, keys):
    files = tier(capacity=3)
    for number, key in enumerate(keys[:3]):
        assert files.write(key, data(number))
    files.keep(keys[0])
    files.keep(keys[2])
    assert files.write(keys[3], data(3)), "in the place of the one that is not kept"
    assert [key in files for key in keys[:4]] == [True, False, True, True]
    files.keep(keys[3])
    assert not files.write(keys[4], data(4))
    files.shrink(0)
    assert len(files) == 3
    assert (read(files, keys[0]) == 0).all()
    assert files.discover(keys[2]) and len(files) == 3


def test_who_deletes_the_first_file_that_was_kept_makes_room(tier, keys, tmp_path):
    files, deleted = tier(capacity=2), []
    files.on_deleted.append(deleted.append)
    for number, key in enumerate(keys[:2]):
        assert files.write(key, data(number))
        files.keep(key)
    assert not files.write(keys[2], data(2))
    next(path for path in files_of(tmp_path) if path.stem == keys[0].digest.hex()).unlink()
    assert files.write(keys[2], data(2))
    assert deleted == [keys[0].digest]
    assert keys[0] not in files and keys[1] in files


def test_what_a_dead_process_left_half_written_is_removed_in_time(tier, keys, tmp_path):
    first = tier()
    first.write(keys[0], data(1))
    (whole,) = files_of(tmp_path)
    partials = [whole.with_name(f"{name}.kv.77.partial") for name in ("a", "b")]
    for path in partials:
        path.write_bytes(b"half")
    os.utime(partials[0], (1, 1))
    assert len(tier()) == 1
    assert files_of(tmp_path) == sorted([whole, partials[1]])


WRITER = """
import sys
import numpy as np
from pathlib import Path
from sageLLM.kv_runtime.tiers import FileTier
from sageLLM.kv_runtime.tiers.block_key import prefix_keys
tier = FileTier(Path(sys.argv[1]), bytes(range(32)), 10**6, 4, 1 << 16)
keys = prefix_keys(("", ""), np.arange(40000, dtype=np.int32), 4)
print("go", flush=True)
for number, key in enumerate(keys):
    tier.write(key, np.full(1 << 16, number % 251, np.uint8))
"""


def test_killed_while_it_writes(tmp_path):
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        end = time.monotonic() + 20
        while len(files_of(tmp_path)) < 20 and time.monotonic() < end:
            pass
        process.send_signal(signal.SIGKILL)
    tier = FileTier(tmp_path, PRINT, 10**6, 4, 1 << 16)
    into = np.zeros(1 << 16, np.uint8)
    found = 0
    for number, key in enumerate(prefix_keys(ANYONE, np.arange(40000, dtype=np.int32), 4)):
        if key in tier:
            tier.read(key, into)
            assert (into == number % 251).all()
            found += 1
    assert found == len(tier) >= 19


# -- with the other tiers ----------------------------------------------------------------------------------------------


def test_what_ddr_would_lose_goes_to_files_and_comes_up_from_there(bed, run, tmp_path):
    b = bed(blocks=8, host_blocks=16, files=(tmp_path, PRINT, 100))
    for name in range(1, 8):
        b.compute(run(name, 32))
        b.work()
    stats = b.tiers.stats()
    assert (stats.nvme_blocks, stats.lost_blocks) == (40, 0), "half of DDR has room for what comes at once"
    for name in (1, 2, 3):
        assert b.fetch(run(name, 32)) == 16
        b.compute(run(name, 32))
        b.work()
    assert b.tiers.stats().nvme_hit_tokens >= 40


def test_a_prefix_survives_a_restart(bed, run, tmp_path):
    b = bed(blocks=8, host_blocks=8, files=(tmp_path, PRINT, 100), watermarks=Watermarks(0.0, 0.0))
    for name in (1, 2, 3):
        b.compute(run(name, 8))
    b.compute(run(4, 32))
    b.work()
    after = bed(blocks=8, host_blocks=2, files=(tmp_path, PRINT, 100))
    assert after.fetch(run(3, 8)) == 8
    assert after.tiers.stats().nvme_hit_tokens == 8


def test_a_damaged_block_ends_a_fetch_and_what_came_before_it_is_kept(bed, run, tmp_path, caplog):
    b = bed(blocks=8, host_blocks=8, files=(tmp_path, PRINT, 100), watermarks=Watermarks(0.0, 0.0))
    b.compute(run(1, 32))
    b.compute(run(2, 32))
    b.work()
    third = prefix_keys(ANYONE, run(1, 32), 4)[2]
    path = next(path for path in files_of(tmp_path) if third.digest.hex() in path.name)
    damage(path, "140")
    after = bed(blocks=16, host_blocks=8, files=(tmp_path, PRINT, 100))
    assert after.fetch(run(1, 32)) == 8
    assert "damaged data" in caplog.text
    assert after.tiers.stats().fetch_failures > 0
    assert third not in after.files
    assert not path.exists()


def test_a_full_disk_fails_nothing_else(bed, run, tmp_path, monkeypatch, caplog):
    b = bed(blocks=8, host_blocks=16, files=(tmp_path, PRINT, 100), watermarks=Watermarks(0.0, 0.0))

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(block_file.os, "writev", full)
    for name in (1, 2):
        b.compute(run(name, 32))
        b.work()
    assert caplog.text.count("no more KV is written") == 1
    assert b.fetch(run(1, 32)) == 16, "from DDR"


def test_what_is_still_being_read_is_not_written(bed, run, tmp_path, monkeypatch):
    """As on a GPU: bytes are there when `synchronize` returns, and more is read while files are written."""
    b = bed(blocks=4, host_blocks=16, files=(tmp_path, PRINT, 100), watermarks=Watermarks(0.0, 0.0))
    b.compute(run(1, 16))
    b.compute(run(2, 16))
    queued, write, kept = [], b.files.write, []

    def read_later(blocks, buffer, rows):
        queued.append((buffer, rows, b.io.pool[blocks]))

    def synchronize():
        while queued:
            buffer, rows, content = queued.pop(0)
            buffer[rows] = content

    def write_while_others_go_on(key, data):
        monkeypatch.setattr(b.files, "write", write)
        kept.extend(b.tiers.save(run(1, 16), np.zeros(4, np.int32), ANYONE))  # what was to be written next is in use
        b.compute(run(3, 16))
        return write(key, data)

    monkeypatch.setattr(b.io, "read", read_later)
    monkeypatch.setattr(b.io, "synchronize", synchronize)
    monkeypatch.setattr(b.files, "write", write_while_others_go_on)
    b.work()
    b.tiers.release(kept)
    assert len(b.files) > 1
    after = bed(blocks=16, host_blocks=2, files=(tmp_path, PRINT, 100))
    assert after.fetch(run(2, 16)) > 0
    assert not after.tiers.stats().fetch_failures


def test_closing_writes_what_is_pinned_too(bed, run, tmp_path):
    b = bed(blocks=8, host_blocks=2, files=(tmp_path, PRINT, 100))
    b.compute(run(1, 16))
    match = b.kv.match(run(1, 16), ANYONE, 16)
    b.kv.commit_all([Commit(run(1, 16), match.blocks, ANYONE, pin=True)])
    b.kv.release(match.blocks)
    b.compute(run(2, 16))
    b.tiers.close()
    b.kv.unpin(run(1, 16), ANYONE)
    after = bed(blocks=16, host_blocks=2, files=(tmp_path, PRINT, 100))
    assert [after.fetch(run(name, 16)) for name in (1, 2)] == [16, 16]


def test_closing_in_too_little_time_leaves_whole_prefixes(bed, run, tmp_path, monkeypatch):
    b = bed(blocks=8, host_blocks=1, files=(tmp_path, PRINT, 100))
    b.now, write = 1.0, b.files.write

    def slow_write(key, data):
        b.now += 4.0
        return write(key, data)

    monkeypatch.setattr(b.files, "write", slow_write)
    b.compute(run(1, 32))
    b.tiers.close()
    monkeypatch.setattr(b.files, "write", lambda *_: False)
    after = bed(blocks=16, host_blocks=2, files=(tmp_path, PRINT, 100))
    assert after.fetch(run(1, 32)) == 12
