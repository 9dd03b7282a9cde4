"""What every configuration object is."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ..errors import NotAvailableError

Positive = Annotated[int, Field(gt=0)]
Ratio = Annotated[float, Field(ge=0, le=1)]


class Config(BaseModel):
    """Base of every configuration object: unknown fields are errors, values are fixed once validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), defer_build=True)


def refuse(asked: bool, option: str, instead: str) -> None:
    """Say of an option that this version cannot serve it.

    Raises:
        NotAvailableError: it is asked for.
    """
    if asked:
        raise NotAvailableError(f"{option} is not available yet; {instead}")
