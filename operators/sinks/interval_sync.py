"""Force a file to the disk at most once a second, on a thread of its own: fsync may take long."""

from __future__ import annotations

import os
import threading

INTERVAL_S = 1.0


class IntervalSync:
    """Syncs within about a second of each write; sleeps while nothing is written."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._dirty = threading.Event()
        self._stopped = threading.Event()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="jsonl_sink fsync", daemon=True)
        self._thread.start()

    def written(self) -> None:
        """Something was written.

        Raises:
            OSError: an earlier fsync failed.
        """
        if self._error is not None:
            raise self._error
        self._dirty.set()

    def stop(self) -> None:
        """End the thread; returns when it no longer touches the file. What is unsynced stays so."""
        self._stopped.set()
        self._dirty.set()
        self._thread.join()

    def _run(self) -> None:
        while self._dirty.wait() and not self._stopped.wait(INTERVAL_S):
            self._dirty.clear()
            if self._stopped.is_set():  # it may have set `dirty` just before that was cleared
                return
            try:
                os.fsync(self._fd)
            except OSError as error:
                self._error = error
                return
