"""filter: keeps the records for which a function of the user's says yes."""

from __future__ import annotations

import inspect
from typing import Any

from ..records import DeadLetter
from ..runtime.flow.ledger import request_of
from ..runtime.flow.operator import ERROR_PORT, Operator, OperatorConfig, Outlet, Port, operator
from .functions import find_function


class FilterConfig(OperatorConfig):
    """`function` is a name given with `@register_function`; a true result keeps the record."""

    function: str


@operator("filter")
class Filter(Operator[FilterConfig]):
    """Passes on the records for which a registered function returns a true value; the others end here, as done.

    A record for which the function raises becomes a dead letter.

    Guarantee: each record leaves at most once, unchanged, in order; what is dropped is counted (`dropped`).
    """

    config_model = FilterConfig
    inputs = (Port("in"),)
    outputs = (Port("out", same_as="in"), ERROR_PORT)
    guarantee = "each record leaves at most once, unchanged, in order; what is dropped is counted"
    example = "filter: {function: is_short}"

    async def open(self) -> None:
        self._function = find_function(self.config.function)

    async def process(self, records: list[Any], out: Outlet) -> None:
        kept: list[Any] = []
        dropped: list[Any] = []
        letters: list[DeadLetter] = []
        for record in records:
            try:
                keep = self._function(record)
                if inspect.isawaitable(keep):
                    keep = await keep
            except Exception as error:
                request = request_of(record)
                text = f"{self.context.name}: {type(error).__name__}: {error}"
                letters.append(DeadLetter(text, src=request.src if request else None, request=request))
            else:
                (kept if keep else dropped).append(record)
        await out.send(kept)
        if dropped:
            out.drop(dropped)
        if letters:
            await out.reject(letters)
