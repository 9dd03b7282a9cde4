"""What an endpoint is: a path, a function that answers calls of it, and how openapi.json describes both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .call import Call


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`body` and `result` are TypedDicts; `answer` may raise HTTPError and RequestError. A path that ends in `{name}`
    stands for all that begin as it does; `call.rest` is what follows."""

    method: Literal["GET", "POST"]
    path: str
    summary: str
    answer: Callable[[Call], Awaitable[None]]
    result: Any
    body: Any = None
    streams: bool = False  # the result comes as server-sent events if the body says `stream: true`
    needs_key: bool = True
    statuses: tuple[int, ...] = ()  # of errors that only this endpoint gives
