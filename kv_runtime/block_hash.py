"""What names a whole block: a hash of all tokens up to its end, and of who may share them."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .node import Namespace
    from .pool import Int32Array

HASH_BYTES = 16


def root_hash(namespace: Namespace) -> bytes:
    """The name of what comes before a namespace's first block; no two (tenant, cache_salt) run together."""
    text = "\0".join([str(len(namespace[0])), *namespace])
    return sha256(text.encode("utf-8", "surrogatepass")).digest()[:HASH_BYTES]


def chain_hashes(parent: bytes, tokens: Int32Array, block_size: int) -> list[bytes]:
    """The hashes of the whole blocks of `tokens` [T], which follow the block `parent`."""
    data, step = tokens.astype("<i4", copy=False).tobytes(), 4 * block_size
    digests = []
    for begin in range(0, len(data) - step + 1, step):
        parent = sha256(parent + data[begin : begin + step]).digest()[:HASH_BYTES]
        digests.append(parent)
    return digests


def block_hashes(tokens: Int32Array, block_size: int, tenant: str = "", cache_salt: str = "") -> list[str]:
    """Return the hash of each whole block of a prompt [T], as KV events name it: 32 hexadecimal digits.

    A block's hash is that of all tokens up to its end and of who may share them: the first 16 bytes of SHA-256 over the
    hash of the block before and its own tokens as little-endian int32.
    """
    prompt = np.asarray(tokens, dtype="<i4")
    return [digest.hex() for digest in chain_hashes(root_hash((tenant, cache_salt)), prompt, block_size)]
