"""What one operator has taken from its inputs and not yet passed on: the requests it answers for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...records import Request, TokenDelta

if TYPE_CHECKING:
    from collections.abc import Iterable


class Custody:
    """Records by the identity of their Request. TokenDeltas are not in it: their request is in another record."""

    __slots__ = ("_held", "_more")

    def __init__(self) -> None:
        self._held: dict[int, Any] = {}
        self._more: dict[int, list[Any]] = {}  # further records of the same request

    def __len__(self) -> int:
        return len(self._held) + sum(map(len, self._more.values()))

    def take(self, records: Iterable[Any]) -> None:
        """The operator gets records."""
        held = self._held
        for record in records:
            kind = type(record)
            if kind is TokenDelta:
                continue
            request = record if kind is Request else record.request
            if request is not None:
                key = id(request)
                if key in held:
                    self._more.setdefault(key, []).append(record)
                else:
                    held[key] = record

    def release(self, records: Iterable[Any]) -> list[Any]:
        """The operator passes records on. Returns those whose request it had not taken.

        Raises:
            TypeError: something is not a record.
        """
        held, more = self._held, self._more
        strangers = []
        try:
            for record in records:
                kind = type(record)
                if kind is TokenDelta:
                    continue
                request = record if kind is Request else record.request
                if request is None:
                    continue
                key = id(request)
                if more and key in more:
                    more[key].pop()
                    if not more[key]:
                        del more[key]
                elif held.pop(key, None) is None:
                    strangers.append(record)
        except AttributeError:
            raise TypeError(f"a {kind.__name__} is no record: send what is defined in records.py") from None
        return strangers

    def take_all(self) -> list[Any]:
        """Everything held; nothing is afterwards."""
        records = [*self._held.values(), *(record for further in self._more.values() for record in further)]
        self._held, self._more = {}, {}
        return records
