"""map: a function of the user's, on every record."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

from ..records import DeadLetter, KVEvent, Request, TokenDelta
from ..runtime.flow.operator import ERROR_PORT, Operator, OperatorConfig, Outlet, Port, operator
from .functions import FunctionName, explain_failure, find_function


class MapConfig(OperatorConfig):
    """`function` is a name given with `@register_function`."""

    function: FunctionName


@operator("map")
class Map(Operator[MapConfig]):
    """Replaces each record by what a registered function returns for it; `None` keeps the record (changed in place).

    The function, which may be async, returns a record of the kind that it was given. A record for which it raises, or
    returns something else, becomes a dead letter; the others go on. TokenDeltas pass untouched.

    Guarantee: one record out for each record in, in order, on `out` or `error`.
    """

    config_model = MapConfig
    inputs = (Port("in"),)
    outputs = (Port("out", same_as="in"), ERROR_PORT)
    guarantee = "one record out for each record in, in order, on `out` or `error`"
    example = "map: {function: shout}"

    async def open(self) -> None:
        self._function = find_function(self.config.function)

    async def process(self, records: list[Any], out: Outlet) -> None:
        mapped: list[Any] = []
        letters: list[DeadLetter] = []
        for record in records:
            if isinstance(record, TokenDelta):
                mapped.append(record)
                continue
            try:
                result = self._function(record)
                if inspect.isawaitable(result):
                    result = await result
                mapped.append(record if result is None else self._adopt(record, result))
            except Exception as error:
                letters.append(explain_failure(self.context.name, record, error))
        await out.send(mapped)
        await out.reject(letters)

    def _adopt(self, record: Any, result: Any) -> Any:
        """The result as a record of the same request, which is known by its Request object."""
        if type(result) is not type(record):
            name = self.config.function
            raise TypeError(f"{name!r} returned a {type(result).__name__} for a {type(record).__name__}")
        if isinstance(record, Request):
            for field in fields(Request):
                setattr(record, field.name, getattr(result, field.name))
            return record
        if isinstance(record, KVEvent):
            return result
        result.request = record.request
        return result
