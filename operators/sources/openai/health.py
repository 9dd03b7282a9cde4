"""GET /health: the process answers. GET /ready: it takes requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from typing_extensions import TypedDict

from .endpoint import Endpoint

if TYPE_CHECKING:
    from .call import Call


class Health(TypedDict):
    status: Literal["alive", "ready"]


async def tell_health(call: Call) -> None:
    await call.answer(200, b'{"status":"alive"}')


async def tell_readiness(call: Call) -> None:
    call.service.check_ready()
    await call.answer(200, b'{"status":"ready"}')


HEALTH = Endpoint("GET", "/health", "Whether the server is alive", tell_health, Health, needs_key=False)
READY = Endpoint(
    "GET",
    "/ready",
    "Whether the model is loaded and the server is not shutting down",
    tell_readiness,
    Health,
    needs_key=False,
    statuses=(503,),
)
