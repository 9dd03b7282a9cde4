"""What the endpoints of one server share: its pipeline, its model's name, who may call, whether calls are taken."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ..net.keys import bearer_of
from .errors import HTTPError

if TYPE_CHECKING:
    from ....models.tokenizer import TextTokenizer
    from ....records import Request
    from ....runtime.calls import Caller
    from ....runtime.services import EngineServices
    from ..net.intake import Intake, Refusal
    from ..net.keys import Key, KeyRing
    from .call import Call
    from .replies import Replies
    from .settings import HTTPConfig

_STATUS = {"shed": 429, "rate_limit": 429, "closing": 503}


class Service:
    """`intake` is None while the model loads."""

    def __init__(self, config: HTTPConfig, engine: EngineServices, keys: KeyRing) -> None:
        self.config = config
        self.engine = engine
        self.keys = keys
        self.model_name = config.model_name or engine.config.model.model_id
        self.created = int(time.time())
        self.intake: Intake | None = None
        self.is_draining = False
        self.replies: set[Replies] = set()  # of the calls that wait
        self._to_push: list[Replies] = []

    @property
    def tokenizer(self) -> TextTokenizer:
        return self.engine.tokenizer

    @property
    def is_ready(self) -> bool:
        return self.intake is not None and not self.is_draining

    def authenticate(self, call: Call) -> None:
        """Find whose call it is.

        Raises:
            HTTPError: 401.
        """
        if not self.keys.is_required:
            return
        bearer = bearer_of(call.headers.get(b"authorization", b"").decode("latin-1"))
        call.key = None if bearer is None else self.keys.authenticate(bearer)
        if call.key is None:
            what = "a key is needed" if bearer is None else "the key is not known"
            headers = [(b"www-authenticate", b"Bearer")]
            raise HTTPError(401, f"{what}: send `Authorization: Bearer <key>`", "invalid_api_key", headers=headers)

    def check_model(self, name: Any) -> None:
        """A call that names no model means the only one.

        Raises:
            HTTPError: 404.
        """
        if name is not None and name != self.model_name:
            told = f"there is no model {name!r} here, only {self.model_name!r}"
            raise HTTPError(404, told, "model_not_found", "model")

    def check_ready(self) -> None:
        """
        Raises:
            HTTPError: 503.
        """
        if self.is_draining:
            raise HTTPError(503, "the server is shutting down", "closing", headers=[(b"retry-after", b"5")])
        if self.intake is None:
            raise HTTPError(503, "the model is still loading", "loading", headers=[(b"retry-after", b"5")])

    def submit(self, request: Request, caller: Caller, key: Key | None) -> None:
        """Hand a request to the pipeline.

        Raises:
            HTTPError: 429 or 503, with when to try again.
        """
        self.check_ready()
        assert self.intake is not None
        refusal = self.intake.submit(request, caller, key)
        if refusal is not None:
            raise _refused(refusal)

    def cancel(self, requests: list[Request]) -> None:
        if self.intake is not None:
            self.intake.cancel(requests)

    def push_soon(self, replies: Replies, loop: Any) -> None:
        """Push this one's news when all that the pipeline tells in this turn of the event loop has been told."""
        if not self._to_push:
            loop.call_soon(self._push)
        self._to_push.append(replies)

    def _push(self) -> None:
        to_push, self._to_push = self._to_push, []
        for replies in to_push:
            replies.push_or_wake()

    def keep_alive(self) -> None:
        """Let each call that has heard nothing for a while show a sign of life."""
        for replies in [*self.replies]:
            replies.poke()


def _refused(refusal: Refusal) -> HTTPError:
    status = _STATUS[refusal.kind]
    code = {"shed": "overloaded", "rate_limit": "rate_limit_exceeded", "closing": "closing"}[refusal.kind]
    headers = [
        (b"retry-after", b"%d" % refusal.retry_after_s),
        (b"x-queue-depth", b"%d" % refusal.queue_depth),
    ]
    message = f"{refusal.message}; {refusal.queue_depth} wait: try again in {refusal.retry_after_s} s"
    return HTTPError(status, message, code, headers=headers)
