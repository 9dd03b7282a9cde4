"""The NVME tier: a file per block, in a folder that outlives the process and that others may read."""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING

from ...errors import ConfigError, KVCacheError
from ..block_hash import HASH_BYTES
from .block_file import file_size, read_block, write_block

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .block_io import Bytes
    from .block_key import BlockKey

log = logging.getLogger("sageLLM")

_SUFFIX = ".kv"
_ABANDONED_S = 3600.0  # a partial file of this age was left by a process that died


class FileTier:
    """At most `capacity` blocks below `path/<fingerprint>/`, the least recently used ones deleted first. Thread-safe.

    The folder is the index: what lies there under a block's name and has its length is taken for that block until it
    is read, which verifies it. A folder that can no longer be written is read only, told by one warning.
    What is kept is given up for nothing: where that fills the capacity there is no room, until somebody deletes the
    files that were kept first. Those in `on_deleted` hear of each block that is given up.
    """

    def __init__(self, path: Path, fingerprint: bytes, capacity: int, block_size: int, block_bytes: int) -> None:
        """Make the folder, if it is not there.

        Raises:
            ConfigError: that cannot be done.
        """
        self.capacity = capacity
        self.is_writable = True
        self.on_deleted: list[Callable[[bytes], None]] = []
        self._folder = path / fingerprint.hex()
        self._fingerprint = fingerprint
        self._file_size = file_size(block_size, block_bytes)
        self._lock = Lock()
        self._index: OrderedDict[bytes, None] = OrderedDict()  # the coldest first
        self._kept: dict[bytes, None] = {}  # not in the index
        self._folders: set[str] = set()
        self._index.update(dict.fromkeys(self._open()))

    def __len__(self) -> int:
        return len(self._index) + len(self._kept)

    def __contains__(self, key: BlockKey) -> bool:
        return key.digest in self._index or key.digest in self._kept

    def _tell_deleted(self, digest: bytes) -> None:
        for tell in self.on_deleted:
            tell(digest)

    def discover(self, key: BlockKey) -> bool:
        """Whether the block is here, whatever another process has put here or deleted meanwhile. Looks at the disk."""
        if self._is_there(key.digest):
            with self._lock:
                if key.digest not in self._kept:
                    self._index.setdefault(key.digest)
            return True
        self._forget(key.digest)
        return False

    def read(self, key: BlockKey, into: Bytes) -> None:
        """Read a block's bytes `into` [block_bytes]; one that cannot be read or is not what it should be is forgotten.

        Raises:
            OSError: it cannot be read.
            KVCacheError: the file is not that block, or is damaged.
        """
        try:
            self._load(key, into)
        except (OSError, KVCacheError) as error:
            self._forget(key.digest)
            if isinstance(error, KVCacheError):
                self._delete(key.digest)
            raise
        with self._lock:
            if key.digest in self._index:
                self._index.move_to_end(key.digest)

    def keep(self, key: BlockKey) -> None:
        """Give up this block, which is here, for no other one."""
        with self._lock:
            self._index.pop(key.digest, None)
            self._kept[key.digest] = None

    @property
    def _has_room(self) -> bool:
        """Whether not everything here is kept; forgets what was kept first, and was deleted by somebody."""
        while True:
            with self._lock:
                if len(self._kept) < self.capacity:
                    return True
                first = next(iter(self._kept))
            if self._is_there(first):
                return False
            self._forget(first)

    def write(self, key: BlockKey, data: Bytes) -> bool:
        """Store a block [block_bytes], in the place of the coldest one if need be; False if that failed, or everything
        here is kept."""
        if not self.is_writable or not self._has_room:
            return False
        try:
            self._store(key, data)
        except OSError as error:
            self._folders.clear()
            self._stop_writing(error)
            return False
        with self._lock:
            if key.digest not in self._kept:
                self._index[key.digest] = None
                self._index.move_to_end(key.digest)
        self.shrink(self.capacity)
        return True

    def shrink(self, count: int) -> None:
        """Delete the coldest blocks, of those that are not kept, until `count` are left."""
        while True:
            with self._lock:
                if len(self) <= count or not self._index:
                    return
                digest, _ = self._index.popitem(last=False)
            self._tell_deleted(digest)
            self._delete(digest)

    # -- the disk ----------------------------------------------------------------------------------------------------

    def _open(self) -> list[bytes]:
        """The digests of the blocks that are there, the coldest first."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"kv_cache.nvme_path: the folder {self._folder} cannot be made: {error.strerror}; write another path"
            ) from error
        return self._scan()

    def _is_there(self, digest: bytes) -> bool:
        with suppress(OSError):
            return self._path(digest).stat().st_size == self._file_size
        return False

    def _load(self, key: BlockKey, into: Bytes) -> None:
        path = self._path(key.digest)
        read_block(path, self._fingerprint, key, into)
        with suppress(OSError):
            os.utime(path)  # so that the order outlives this process

    def _store(self, key: BlockKey, data: Bytes) -> None:
        path = self._path(key.digest)
        if path.parent.name not in self._folders:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._folders.add(path.parent.name)
        write_block(path, self._fingerprint, key, data)

    def _delete(self, digest: bytes) -> None:
        with suppress(OSError):
            self._path(digest).unlink()

    # ----------------------------------------------------------------------------------------------------------------

    def _path(self, digest: bytes) -> Path:
        name = digest.hex()
        return self._folder / name[:2] / (name + _SUFFIX)

    def _forget(self, digest: bytes) -> None:
        with self._lock:
            known = digest in self._index or digest in self._kept
            self._index.pop(digest, None)
            self._kept.pop(digest, None)
        if known:
            self._tell_deleted(digest)

    def _stop_writing(self, error: OSError) -> None:
        self.is_writable = False
        log.warning("kv_cache.nvme_path: no more KV is written below %s, only read: %s", self._folder, error)

    def _scan(self) -> list[bytes]:
        """The digests that files are named after, the least recently used first. Removes what a dead process left."""
        found: list[tuple[float, bytes]] = []
        now = time.time()
        with suppress(OSError):
            for folder in os.scandir(self._folder):
                if folder.is_dir():
                    for entry in os.scandir(folder.path):
                        self._scan_file(entry, now, found)
        found.sort()
        return [digest for _, digest in found]

    def _scan_file(self, entry: os.DirEntry[str], now: float, found: list[tuple[float, bytes]]) -> None:
        with suppress(OSError, ValueError):
            stat = entry.stat()
            if entry.name.endswith(".partial"):
                if now - stat.st_mtime > _ABANDONED_S:
                    os.unlink(entry.path)
            elif entry.name.endswith(_SUFFIX) and stat.st_size == self._file_size:
                digest = bytes.fromhex(entry.name.removesuffix(_SUFFIX))
                if len(digest) == HASH_BYTES:
                    found.append((stat.st_mtime, digest))
