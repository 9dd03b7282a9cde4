"""Measured rates on disk: one file for each device, library version and model shape."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from .device_rates import DeviceRates

if TYPE_CHECKING:
    from collections.abc import Mapping

log = logging.getLogger("sageLLM")

_FORMAT = 1


class RatesFile:
    """Where the rates for `key` (plain values: whatever changes the rates) are kept between runs.

    The folder is `$XDG_CACHE_HOME/sagellm`, else `~/.cache/sagellm`. A file that is torn, or was written for another
    key or by another version, counts as none.
    """

    def __init__(self, key: Mapping[str, object], folder: Path | None = None) -> None:
        self._key = json.loads(json.dumps({"format": _FORMAT, **key}))
        name = hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()[:16]
        self.path = (folder or cache_folder()) / f"rates-{name}.json"

    def read(self) -> DeviceRates | None:
        """What was measured before; None if nothing was."""
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            return DeviceRates.from_dict(data["rates"]) if data["key"] == self._key else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, rates: DeviceRates) -> None:
        """Keep rates: whole or not at all. Where nothing can be written, a warning says so and the next run measures
        again."""
        text = json.dumps({"key": self._key, "rates": rates.to_dict()}, indent=1)
        draft = self.path.with_name(f"{self.path.name}.{uuid4().hex}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(text, encoding="utf-8")
            draft.replace(self.path)
        except OSError as error:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            log.warning("the device's rates cannot be kept, so the next run measures them again: %s", error)


def cache_folder() -> Path:
    """Where sageLLM keeps what it can make again."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base) / "sagellm" if base else Path.home() / ".cache" / "sagellm"
