"""Fields of OpenAI's requests that are no parameters here: each is taken with the values that ask for nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic_core import core_schema
from typing_extensions import TypedDict

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler


@dataclass(frozen=True)
class Only:
    """Takes null and these values; `True` is not `1`."""

    values: tuple[Any, ...]
    why: str = "it asks for what is not available yet: leave it out"

    def check(self, found: Any) -> Any:
        if found is None or any(found == value and type(found) is type(value) for value in self.values):
            return None
        raise ValueError(self.why)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, core_schema.any_schema())

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": [None, *self.values]}


def _only(*values: Any) -> Only:
    return Only(values)


Null = Annotated[Any, _only()]
EmptyList = Annotated[Any, _only([])]
TextOnly = Annotated[Any, _only(["text"])]
NoChoice = Annotated[Any, _only("none", "auto")]
UsualTier = Annotated[Any, _only("auto", "default")]
Off = Annotated[Any, _only(False)]
One = Annotated[Any, _only(1)]


class OpenAIFields(TypedDict, total=False):
    """The pipeline has one model, keeps no account of users, and writes results where its sinks say."""

    model: str | None
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None
    metadata: dict[str, str] | None
    store: bool | None
    service_tier: UsualTier
    modalities: TextOnly
    functions: EmptyList
    function_call: NoChoice
    echo: Off
    best_of: One
    suffix: Null
    audio: Null
    prediction: Null
    reasoning_effort: Null
    verbosity: Null
    web_search_options: Null
