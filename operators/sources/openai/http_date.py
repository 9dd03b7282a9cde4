"""The Date header."""

from __future__ import annotations

import time
from email.utils import formatdate
from functools import lru_cache


def http_date() -> bytes:
    """Now, as a Date header has it."""
    return _date_of(int(time.time()))


@lru_cache(maxsize=1)
def _date_of(second: int) -> bytes:
    return formatdate(second, usegmt=True).encode()
