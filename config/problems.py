"""What is wrong with the values of a configuration object, and where in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel

from ..errors import ConfigError, NotAvailableError
from .wording import describe_type, did_you_mean, show

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import ValidationError

CONTRADICTION = "contradiction"  # pydantic's type of the error that carries Contradictions, as `found`
FieldPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Fields that cannot be as they are together, or one that this version cannot serve (then `available` is false).

    `keys` are dotted paths in the object that tells it: what to change, then what stands against it.
    """

    text: str
    keys: tuple[str, ...]
    available: bool = True


def not_available(key: str, option: str, instead: str) -> Contradiction:
    """An option of the design that this version cannot serve."""
    return Contradiction(f"{option} is not available yet; {instead}", (key,), available=False)


@dataclass(frozen=True, slots=True)
class FieldProblem:
    """One thing that is wrong. `paths` are the fields it is about, the guilty one first; () is the object itself."""

    paths: tuple[FieldPath, ...]
    text: str
    at_key: bool = False
    available: bool = True


def explain(model: type[BaseModel], error: ValidationError, what: str) -> Iterator[FieldProblem]:
    """The problems of values that are no `model`; `what` is its name in the texts."""
    for detail in error.errors(include_url=False):
        location = tuple(part for part in detail["loc"] if part != "[key]")
        if detail["type"] == CONTRADICTION:
            owner = ".".join(map(str, (what, *location)))
            for each in detail["ctx"]["found"]:
                paths = tuple((*location, *key.split(".")) for key in each.keys)
                text = f"{owner}: {each.text}" if each.available else each.text
                yield FieldProblem(paths, text, True, each.available)
        else:
            yield _explain_field(model, detail, location, what)


def to_config_error(model: type[BaseModel], error: ValidationError, what: str) -> ConfigError:
    """All problems in one error; NotAvailableError where that is all they are."""
    problems = [*explain(model, error, what)]
    kind = ConfigError if any(problem.available for problem in problems) else NotAvailableError
    return kind("\n".join(problem.text for problem in problems))


def _explain_field(model: type[BaseModel], detail: Any, location: FieldPath, what: str) -> FieldProblem:
    message = detail["msg"].removeprefix("Value error, ")
    if not location:
        return FieldProblem(((),), f"{what}: {message}", at_key=True)
    owner, kind, name = _model_at(model, location[:-1]), detail["type"], ".".join(map(str, location))
    if kind == "extra_forbidden":
        known = owner.model_fields if owner else ()
        text = f"{what} has no field {name!r}{did_you_mean(str(location[-1]), known)}"
        return FieldProblem((location,), text, at_key=True)
    wanted = _wanted(owner, str(location[-1])) if owner else ""
    if kind == "missing":
        text = f"{what} lacks the field {name!r}; write `{location[-1]}: <{wanted or 'value'}>`"
        return FieldProblem((location,), text)
    explained = kind == "value_error"  # by a validator of ours
    message = message[:1].lower() + message[1:]
    found = "" if explained and isinstance(detail["input"], dict) else f"found {show(detail['input'])}, "
    write = f"; write `{location[-1]}: <{wanted}>`" if wanted and not explained else ""
    return FieldProblem((location,), f"{what}, field {name!r}: {found}{message}{write}")


def _model_at(model: type[BaseModel], location: FieldPath) -> type[BaseModel] | None:
    """The nested model at a field path, or None where the path leads to something else."""
    current: type[BaseModel] | None = model
    for step in location:
        if current is None or step not in current.model_fields:
            return None
        annotation = current.model_fields[str(step)].annotation
        options = [annotation, *get_args(annotation)]
        current = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
    return current


def _wanted(owner: type[BaseModel], name: str) -> str:
    if name not in owner.model_fields:
        return ""
    schema = owner.model_json_schema()
    return describe_type(schema["properties"][name], schema.get("$defs", {}))
