"""Many threads over one pool, its tiers and their copier: no block ever holds what it should not."""

from __future__ import annotations

import sys
import threading
import time

import numpy as np
import pytest

from sageLLM.kv_runtime.tiers import Watermarks


@pytest.fixture
def busy_switching():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("busy_switching")
@pytest.mark.parametrize("host_blocks", [6, 64])
@pytest.mark.parametrize("in_files", [False, True])
def test_hammer(bed, tmp_path, host_blocks, in_files):
    files = (tmp_path, bytes(32), 40) if in_files else None
    b = bed(blocks=24, host_blocks=host_blocks, files=files, thread=True, watermarks=Watermarks(0.5, 0.2))
    failures = []

    def work(me):
        rng = np.random.default_rng(me)
        for turn in range(150):
            prompt = rng.integers(0, 2, int(rng.integers(4, 33))).astype(np.int32)
            namespace = ("", str(rng.integers(2)))
            wish = b.wish(prompt, namespace)
            end = time.monotonic() + 5
            while b.tiers.fetcher.is_coming(wish) and rng.random() < 0.98:
                assert time.monotonic() < end, "the fetch never ends"
            b.compute(prompt, namespace)
            if turn % 40 == me:
                b.io.fail = ("read", "write", "fence")[me % 3]

    def guarded(me):
        try:
            work(me)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(me,)) for me in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    b.tiers.close()
    assert not failures
    stats = b.tiers.stats()
    assert stats.ddr_hit_tokens > 0
    if in_files:
        assert stats.bytes_ddr_to_nvme > 0
