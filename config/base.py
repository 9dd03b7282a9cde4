"""What every configuration object is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from .problems import CONTRADICTION, to_config_error

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Self

    from .problems import Contradiction

Positive = Annotated[int, Field(gt=0)]
Ratio = Annotated[float, Field(ge=0, le=1)]


class Config(BaseModel):
    """Base of every configuration object: unknown fields are errors, values are fixed once validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), defer_build=True)

    def __init__(self, **values: Any) -> None:
        """Check the values.

        Raises:
            ConfigError: something is wrong with them; the message tells everything that is.
            NotAvailableError: they ask for something this version cannot serve, and nothing else is wrong.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise to_config_error(type(self), error, type(self).__name__) from None

    # pydantic would call `__init__` for objects inside others too, and stop at the first that is wrong
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def contradictions(self) -> Iterable[Contradiction]:
        """What its fields, each of which is valid, cannot be together. Subclasses override this."""
        return ()

    def changed(self, *names: str) -> Iterator[str]:
        """Those of the fields that are not at their default."""
        for name in names:
            field = type(self).model_fields[name]
            if getattr(self, name) != field.get_default(call_default_factory=True, validated_data={}):
                yield name

    @model_validator(mode="after")
    def _has_no_contradictions(self) -> Self:
        if found := [*self.contradictions()]:
            raise PydanticCustomError(
                CONTRADICTION, "{text}", {"text": "; ".join(c.text for c in found), "found": found}
            )
        return self
