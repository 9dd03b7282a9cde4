"""What flows in SAGE: an item to generate from, and what comes of it.

    "2+2?"
    {"prompt": "2+2?", "options": {"max_tokens": 8}, ...}, or with "messages" or "prompt_tokens" instead of "prompt"

    {"text", "usage", "finish_reason", "context"}                which was computed; `context` is the item it came of
    {"text", "usage", "finish_reason", "context", "error"}       which was not

`options` are the fields of a request line (request_format.py). An item may hold other fields: they are its context.
"""

from __future__ import annotations

import uuid
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from ..errors import RequestError, SageLLMError
from ..records import FinishReason, Usage
from .sinks.result_format import completion_fields
from .sources.request_format import RequestLine, request_from_fields

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..records import Completion, Request

PROMPTS = ("prompt", "messages", "prompt_tokens")
_OPTIONS = frozenset(RequestLine.__annotations__) - {*PROMPTS, "id", "request_id", "stream"}
_OUTPUTS = ("text", "embedding", "usage", "finish_reason", "choices", "tool_calls", "logprobs", "prompt_logprobs")


def parse_item(item: Any, options: Mapping[str, Any]) -> Request:
    """The request of an item; `options` hold where its own say nothing.

    Raises:
        RequestError: it is no item, or a field of it has a wrong type or value; the message names each.
    """
    if isinstance(item, str):
        item = {"prompt": item}
    if not isinstance(item, dict):
        raise RequestError(f'found {item!r:.60}: write a text, or a dictionary such as {{"prompt": "..."}}')
    if misplaced := sorted(_OPTIONS.intersection(item)):
        raise RequestError(f"found {misplaced[0]!r} beside the prompt: write it as a field of 'options'")
    own = item.get("options") or {}
    if not isinstance(own, dict):
        raise RequestError(f'options: found {own!r:.60}, write a dictionary such as {{"max_tokens": 8}}')
    check_options(own)
    given = {name: item[name] for name in PROMPTS if item.get(name) is not None}
    if not given:
        found = ", ".join(map(repr, item)) or "nothing"
        raise RequestError(f"found {found}: an item needs one of {', '.join(PROMPTS)}")
    return request_from_fields({**given, **_merge(options, own)}, uuid.uuid4().hex)


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse fields that are no option of an item.

    Raises:
        RequestError: the message says which one, and what to write.
    """
    for name in options:
        if name in PROMPTS:
            raise RequestError(f"options.{name}: write it beside 'options'")
        if name == "stream":
            raise RequestError("options.stream: items of a SAGE flow come whole, leave it out")


def _merge(options: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """An item's own options replace those that mean the same."""
    lengths = {"max_new_tokens", "max_tokens", "max_completion_tokens"}
    replaced = lengths if lengths.intersection(own) else set()
    return {name: value for name, value in options.items() if name not in replaced} | dict(own)


def completion_item(completion: Completion, context: Any) -> dict[str, Any]:
    """What comes of an item that was computed; of its fields those that were asked for are there."""
    found = completion_fields(completion)
    return {name: found[name] for name in _OUTPUTS if name in found} | {"context": context}


def failed_item(error: Exception | str, context: Any) -> dict[str, Any]:
    """What comes of an item that was not."""
    if isinstance(error, Exception) and not isinstance(error, SageLLMError):
        error = f"{type(error).__name__}: {error}"
    found = {"text": "", "usage": Usage(0, 0, 0)._asdict(), "finish_reason": FinishReason.ERROR.value}
    return found | {"context": context, "error": str(error)}


def has_failed(item: Any) -> bool:
    """Whether a stage before has failed on it: then it goes through the others as it is."""
    return isinstance(item, dict) and isinstance(item.get("error"), str)


def request_item(request: Request) -> dict[str, Any]:
    """A request as an item; what is done to it does not change the request."""
    given = {name: deepcopy(getattr(request, name)) for name in PROMPTS if getattr(request, name) is not None}
    return {**given, "request_id": request.request_id}
