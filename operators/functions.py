"""Plain functions by name, for `map` and `filter`: `@register_function("name")`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import AfterValidator

from ..config.wording import did_you_mean, nearest
from ..errors import ConfigError, RequestError
from ..records import DeadLetter
from ..runtime.flow.ledger import request_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..records import Record

FunctionT = TypeVar("FunctionT", bound="Callable[..., Any]")

_FUNCTIONS: dict[str, Callable[..., Any]] = {}


def register_function(name: str) -> Callable[[FunctionT], FunctionT]:
    """Make a function known to pipelines. It takes one record; it may be async.

    Raises:
        ConfigError: another function has the name.
    """

    def decorate(function: FunctionT) -> FunctionT:
        known = _FUNCTIONS.get(name)
        if known is not None and known.__qualname__ != function.__qualname__:
            raise ConfigError(f"function {name!r} is already registered by {known.__module__}: choose another name")
        _FUNCTIONS[name] = function
        return function

    return decorate


def _check_registered(name: str) -> str:
    if name not in _FUNCTIONS:
        own = "; register your own with @register_function, and add --allow-module <its module>"
        hint = "" if nearest(name, _FUNCTIONS) else own
        raise ValueError(f"no function of that name is registered{did_you_mean(name, _FUNCTIONS)}{hint}")
    return name


FunctionName = Annotated[str, AfterValidator(_check_registered)]


def find_function(name: FunctionName) -> Callable[..., Any]:
    """The function registered under a name."""
    return _FUNCTIONS[name]


def explain_failure(operator: str, record: Record, error: Exception) -> DeadLetter:
    """The dead letter of a record for which a function raised."""
    text = str(error) if isinstance(error, RequestError) else f"{type(error).__name__}: {error}"
    if isinstance(record, DeadLetter):
        return DeadLetter(f"{record.error}; then {operator}: {text}", record.raw, record.src, record.request)
    request = request_of(record)
    return DeadLetter(f"{operator}: {text}", src=request.src if request else None, request=request)
