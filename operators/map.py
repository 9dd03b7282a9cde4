"""map: a function of the user's, on every record."""

from __future__ import annotations

import inspect
from typing import Any

from ..records import DeadLetter
from ..runtime.flow.ledger import request_of
from ..runtime.flow.operator import ERROR_PORT, Operator, OperatorConfig, Outlet, Port, operator
from .functions import find_function


class MapConfig(OperatorConfig):
    """`function` is a name given with `@register_function`."""

    function: str


@operator("map")
class Map(Operator[MapConfig]):
    """Replaces each record by what a registered function returns for it; `None` keeps the record (changed in place).

    A record for which the function raises becomes a dead letter; the others go on.

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
        mapped, letters = [], []
        for record in records:
            try:
                result = self._function(record)
                if inspect.isawaitable(result):
                    result = await result
            except Exception as error:
                request = request_of(record)
                text = f"{self.context.name}: {type(error).__name__}: {error}"
                letters.append(DeadLetter(text, src=request.src if request else None, request=request))
            else:
                mapped.append(record if result is None else result)
        await out.send(mapped)
        if letters:
            await out.reject(letters)
