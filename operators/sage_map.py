"""sage_map: a MapFunction of SAGE, on every request or completion."""

from __future__ import annotations

import inspect
import sys
from itertools import groupby
from typing import Annotated, Any, Self

import anyio
from pydantic import AfterValidator, Field, model_validator

from ..errors import RequestError
from ..records import Completion, Request, TokenDelta
from ..runtime.flow.operator import ERROR_PORT, Operator, OperatorConfig, Outlet, Port, RecordKind, operator
from .functions import explain_failure
from .sage_items import PROMPTS, completion_item, request_item
from .sources.request_format import request_from_fields


def _find_class(path: str) -> type[Any]:
    """The class at `module:name`.

    Raises:
        ValueError: there is none, or it is no MapFunction; the message says what to write.
    """
    module, colon, name = path.partition(":")
    if not colon:
        raise ValueError("write the module and the class, as in 'my_functions:Shout'")
    if module not in sys.modules:  # a pipeline file imports nothing by itself
        raise ValueError(f"module {module!r} is not imported: add --allow-module {module}")
    found = getattr(sys.modules[module], name, None)
    if found is None:
        raise ValueError(f"module {module!r} has no {name!r}")
    try:
        from sage.foundation import MapFunction
    except ImportError as error:
        raise ValueError('sage_map needs SAGE: pip install "sagellm[sage]"') from error
    if not (isinstance(found, type) and issubclass(found, MapFunction)):
        raise ValueError(f"{name!r} is no class that is derived from sage.foundation.MapFunction")
    return found


def _check_class(path: str) -> str:
    _find_class(path)
    return path


class SageMapConfig(OperatorConfig):
    """`function` is `module:class`, of a module that --allow-module imports; `kwargs` are the class's arguments."""

    function: Annotated[str, AfterValidator(_check_class)]
    kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        found = _find_class(self.function)
        try:
            inspect.signature(found).bind(**self.kwargs)
        except TypeError as error:
            raise ValueError(f"kwargs: {self.function} cannot be called so: {error}") from error
        return self


@operator("sage_map")
class SageMap(Operator[SageMapConfig]):
    """Runs a MapFunction of SAGE on each request (before `tokenize`) or completion (behind `detokenize`).

    It gets what it would in a SAGE flow: of a completion `{"text", "usage", "finish_reason", "context"}`, where
    `context` is the request, of a request `{"prompt", "request_id"}`, or `messages` or `prompt_tokens` instead. What it
    returns, a dictionary or only its text, becomes the completion's text (of its first choice) or the request's prompt;
    nothing else of them can change, and of an embedding nothing. `None` ends the record here. Its `execute` may block:
    it runs on another thread, for one record at a time. If the function has a `close`, that is called at the end.
    TokenDeltas pass untouched.

    Guarantee: one record out for each record in, in order, on `out` or `error`, but for those that `None` ends, which
    are counted.
    """

    config_model = SageMapConfig
    inputs = (Port("in", frozenset({RecordKind.REQUEST, RecordKind.DELTA, RecordKind.COMPLETION})),)
    outputs = (Port("out", same_as="in"), ERROR_PORT)
    guarantee = "one record out for each record in, in order, on `out` or `error`; those that `None` ends are counted"
    example = 'sage_map: {function: "my_functions:Shout", kwargs: {marks: 3}}'

    async def open(self) -> None:
        found, kwargs = _find_class(self.config.function), self.config.kwargs
        self._function = await anyio.to_thread.run_sync(lambda: found(**kwargs))

    async def process(self, records: list[Any], out: Outlet) -> None:
        for is_delta, group in groupby(records, lambda record: isinstance(record, TokenDelta)):
            if is_delta:
                await out.send([*group])
                continue
            for record in group:
                await self._replace(record, out)

    async def _replace(self, record: Request | Completion, out: Outlet) -> None:
        """Send on what the function makes of a record, as soon as it is there: the next one may take long."""
        try:
            mapped = await self._map(record)
        except Exception as error:
            await out.reject([explain_failure(self.context.name, record, error)])
            return
        if mapped is None:
            out.drop([record])
        else:
            await out.send([mapped])

    async def _map(self, record: Request | Completion) -> Request | Completion | None:
        result = await anyio.to_thread.run_sync(self._function.execute, _item_of(record), abandon_on_cancel=True)
        if result is None:
            return None
        return _change_request(record, result) if isinstance(record, Request) else _change_completion(record, result)

    async def close(self) -> None:
        close = getattr(getattr(self, "_function", None), "close", None)
        if close is not None:
            await anyio.to_thread.run_sync(close, abandon_on_cancel=True)


def _item_of(record: Request | Completion) -> dict[str, Any]:
    if isinstance(record, Request):
        return request_item(record)
    return completion_item(record, request_item(record.request))


def _change_request(request: Request, result: Any) -> Request:
    item = {"prompt": result} if isinstance(result, str) else result
    if not isinstance(item, dict):
        raise RequestError(f"found {result!r:.60}: return a text, or a dictionary with one of {', '.join(PROMPTS)}")
    _check_rest(item, request_item(request), {*PROMPTS})
    given = {name: item[name] for name in PROMPTS if item.get(name) is not None}
    changed = request_from_fields(given, request.request_id)
    request.prompt, request.messages, request.prompt_tokens = changed.prompt, changed.messages, changed.prompt_tokens
    return request


def _change_completion(completion: Completion, result: Any) -> Completion:
    given = _item_of(completion)
    may_change = given.keys() & {"text"}  # an embedding has none
    item = {"text": result} if isinstance(result, str) and may_change else result
    if not isinstance(item, dict) or (may_change and not isinstance(item.get("text"), str)):
        raise RequestError(f"found {result!r:.60}: return a text, or a dictionary with a 'text'")
    _check_rest(item, given, may_change)
    if may_change:
        completion.choices[0].text = item["text"]
    return completion


def _check_rest(item: dict[str, Any], given: dict[str, Any], may_change: set[str]) -> None:
    """Refuse what the record has no place for, instead of losing it."""
    for name, value in item.items():
        if name not in may_change and (name not in given or value != given[name]):
            what = "changed" if name in given else "new"
            names = " or ".join(sorted(may_change)) or "None"
            raise RequestError(f"{name!r} is {what}: only {names} can be given back")
