"""The ASGI application: finds the endpoint of a call, checks its key, and answers errors as OpenAI's API does."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ....errors import RequestError
from .call import Call
from .endpoints import ENDPOINTS
from .errors import HTTPError, bad_request
from .replies import ClientGoneError

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from .endpoint import Endpoint
    from .service import Service

log = logging.getLogger("sageLLM.http")


def allow_origins(app: App, origins: list[str]) -> Any:
    """The application as browsers may call it from pages of these origins; from none, the application itself."""
    if not origins:
        return app
    from starlette.middleware.cors import CORSMiddleware

    exposed = ["x-request-id", "x-queue-depth", "retry-after"]
    return CORSMiddleware(
        app, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"], expose_headers=exposed
    )


class App:
    """One server's application."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._paths: dict[str, dict[str, Endpoint]] = {}
        self._prefixes: dict[str, dict[str, Endpoint]] = {}
        for endpoint in ENDPOINTS:
            stem, _, name = endpoint.path.partition("{")
            table = self._prefixes if name else self._paths
            table.setdefault(stem, {})[endpoint.method] = endpoint

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        call = Call(self._service, scope, receive, send)
        try:
            try:
                await self._answer(call)
            except RequestError as error:
                raise bad_request(error) from None
        except HTTPError as error:
            if not call.started:
                await call.answer(error.status, error.body, error.headers)
        except ClientGoneError:
            pass
        except Exception:
            log.exception("%s %s failed", call.method, call.path)
            if call.started:
                call.connection.cut("answering it failed")
            else:
                await call.answer(500, HTTPError(500, "the server failed while it answered", "internal_error").body)

    async def _answer(self, call: Call) -> None:
        call.check_headers()
        endpoint = self._find(call)
        if endpoint.needs_key:
            self._service.authenticate(call)
        await endpoint.answer(call)

    def _find(self, call: Call) -> Endpoint:
        methods = self._paths.get(call.path)
        if methods is None:
            for prefix, candidates in self._prefixes.items():
                if call.path.startswith(prefix) and len(call.path) > len(prefix):
                    call.rest, methods = call.path[len(prefix) :], candidates
                    break
        if methods is None:
            known = ", ".join(sorted(self._paths))
            raise HTTPError(404, f"there is no {call.path!r}: known are {known}", "not_found")
        endpoint = methods.get("GET" if call.method == "HEAD" else call.method)
        if endpoint is None:
            allowed = ", ".join("GET, HEAD" if method == "GET" else method for method in methods)
            told = f"{call.path} takes {allowed}, not {call.method}"
            raise HTTPError(405, told, "method_not_allowed", headers=[(b"allow", allowed.encode())])
        return endpoint
