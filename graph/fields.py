"""Checks the values of a section, and notes what is wrong with them where it is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ..config.problems import explain

if TYPE_CHECKING:
    from pydantic import BaseModel

    from .document import KeyPath
    from .problems import Problems


def validate_model(
    model: type[BaseModel], values: Any, path: KeyPath, what: str, problems: Problems, context: Any = None
) -> Any:
    """The validated model, or None after noting every problem of its values; `path` is where they stand."""
    try:
        return model.model_validate(values, context=context)
    except ValidationError as error:
        for problem in explain(model, error, what):
            problems.add_any([(*path, *each) for each in problem.paths], problem.text, at_key=problem.at_key)
    return None
