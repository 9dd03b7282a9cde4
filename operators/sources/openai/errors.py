"""Errors as OpenAI's API tells them: a status, and a body `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic_core import to_json

from ....records import Completion, FinishReason
from ....runtime.flow.ledger import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ....errors import RequestError
    from ....records import DeadLetter

_TYPES = {401: "authentication_error", 429: "rate_limit_error", 504: "timeout_error"}
_TIMEOUTS = frozenset({FinishReason.QUEUE_TIMEOUT, FinishReason.FIRST_TOKEN_TIMEOUT, FinishReason.TIMEOUT})


class HTTPError(Exception):
    """What a call is answered instead of what it asked for. `code` is for programs; `headers` are the answer's."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = [*headers]

    @property
    def body(self) -> bytes:
        kind = _TYPES.get(self.status) or ("invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return to_json({"error": error})


def bad_request(error: RequestError) -> HTTPError:
    """400, for a request that fails its validation."""
    return HTTPError(400, str(error), "invalid_request", error.param)


def failure_of(record: Completion | DeadLetter | None, outcome: Outcome) -> HTTPError | None:
    """What a request's end means to its caller; None if it has been computed."""
    if isinstance(record, Completion):
        return _failure_of_completion(record, outcome)
    if outcome is Outcome.CANCELLED:
        return HTTPError(503, "the server is shutting down and has cancelled the request", "cancelled")
    if record is not None:
        if record.blames_request:
            return HTTPError(400, record.error, "invalid_request", record.param)
        return HTTPError(500, record.error, "failed")
    if outcome is Outcome.DONE:
        return HTTPError(400, "a stage of the pipeline has left the request out", "filtered")
    return HTTPError(500, f"the request ended with {outcome} and without a result", "failed")


def _failure_of_completion(completion: Completion, outcome: Outcome) -> HTTPError | None:
    if outcome is Outcome.DONE:
        return None
    if outcome is Outcome.CANCELLED:
        return HTTPError(503, "the server is shutting down and has cancelled the request", "cancelled")
    for choice in completion.choices:
        reason = choice.finish_reason
        if reason in _TIMEOUTS:
            return HTTPError(504, f"the request was ended by the scheduler: {reason}", reason)
    return HTTPError(500, "the request failed while it was computed", "failed")
