"""The file that holds one block: a header that says whose it is, the block's tokens, its bytes.

    magic 8 | version u32 | tokens u32 | data bytes u64 | fingerprint 32 | digest 16 | parent 16 | crc32 of data u32
    | crc32 of all before and of the tokens u32 | tokens, int32 | data

Little endian. A file that is torn, truncated, of another version, model or block is refused, never read as KV.
"""

from __future__ import annotations

import os
import struct
from threading import get_ident
from typing import TYPE_CHECKING
from zlib import crc32

from ...errors import KVCacheError
from .block_key import BlockKey

if TYPE_CHECKING:
    from pathlib import Path

    from .block_io import Bytes

MAGIC = b"sageLLM\x00"
VERSION = 1
_HEADER = struct.Struct("<8sIIQ32s16s16sI")
_CHECK = struct.Struct("<I")


def file_size(block_size: int, block_bytes: int) -> int:
    """How long the file of a block is."""
    return _HEADER.size + _CHECK.size + 4 * block_size + block_bytes


def write_block(path: Path, fingerprint: bytes, key: BlockKey, data: Bytes) -> None:
    """Write the file under another name, then give it its own: at every moment it is whole or not there.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    head = _HEADER.pack(
        MAGIC, VERSION, len(key.tokens) // 4, data.nbytes, fingerprint, key.digest, key.parent, crc32(data.data)
    )
    check = _CHECK.pack(crc32(key.tokens, crc32(head)))
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{get_ident()}.partial")
    try:
        with temporary.open("wb", buffering=0) as file:
            wanted = len(head) + len(check) + len(key.tokens) + data.nbytes
            written = os.writev(file.fileno(), [head, check, key.tokens, data.data])
            if written < wanted:
                raise OSError(f"only {written} of {wanted} bytes were written")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_block(path: Path, fingerprint: bytes, key: BlockKey, into: Bytes) -> None:
    """Read the block's bytes `into` [block_bytes].

    Raises:
        OSError: it cannot be read.
        KVCacheError: the file is not that block, or is damaged.
    """
    head_size = _HEADER.size + _CHECK.size + len(key.tokens)
    head = bytearray(head_size)
    with path.open("rb", buffering=0) as file:
        count = os.readv(file.fileno(), [head, into.data])
        if count != head_size + into.nbytes or file.read(1):
            raise KVCacheError(f"{path} is not {head_size + into.nbytes} bytes long: it is torn")
    magic, version, tokens, size, print_, digest, parent, data_crc = _HEADER.unpack_from(head)
    if magic != MAGIC or version != VERSION:
        raise KVCacheError(f"{path} is no KV block of format {VERSION}")
    end = _HEADER.size + _CHECK.size
    (check,) = _CHECK.unpack_from(head, _HEADER.size)
    if check != crc32(head[end:], crc32(head[: _HEADER.size])):
        raise KVCacheError(f"{path} has a damaged header")
    found = BlockKey(digest, parent, bytes(head[end:]))
    if print_ != fingerprint or found != key or tokens * 4 != len(key.tokens) or size != into.nbytes:
        raise KVCacheError(f"{path} holds another block, or one of another model")
    if crc32(into.data) != data_crc:
        raise KVCacheError(f"{path} has damaged data")
