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
    why: str

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


def only(*values: Any, why: str = "it asks for what is not available yet: leave it out") -> Only:
    """Null and these values; `why` tells what to write instead of others."""
    return Only(values, why)


Null = Annotated[Any, only()]
EmptyList = Annotated[Any, only([])]
TextOnly = Annotated[Any, only(["text"], why='outputs are text: write ["text"], or leave it out')]
UsualTier = Annotated[Any, only("auto", "default", why="there is one tier: write auto, or leave it out")]
UsualVerbosity = Annotated[Any, only("medium", why="say in a message how long an answer shall be, and leave it out")]
Off = Annotated[Any, only(False)]
_OldFunctions = Annotated[Any, only([], why="this is OpenAI's old form: write tools")]
_OldChoice = Annotated[Any, only("none", "auto", why="this is OpenAI's old form: write tools and tool_choice")]
_NoEcho = Annotated[Any, only(False, why="a prompt is not told again: leave it out; prompt_logprobs are there")]
_One = Annotated[Any, only(1, why="write n, and choose among the outputs")]
_NoSuffix = Annotated[Any, only("", why="a text is continued, never filled in: leave it out")]
_NoEffort = Annotated[Any, only(why="a model's template knows of it: write chat_template_kwargs, or leave it out")]


class OpenAIFields(TypedDict, total=False):
    """The pipeline has one model, keeps no account of users, and writes results where its sinks say. What prompts have
    in common is cached whatever `prompt_cache_retention` says."""

    model: str | None
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None
    prompt_cache_retention: str | None
    metadata: dict[str, str] | None
    store: bool | None
    service_tier: UsualTier
    modalities: TextOnly
    functions: _OldFunctions
    function_call: _OldChoice
    echo: _NoEcho
    best_of: _One
    suffix: _NoSuffix
    audio: Null
    prediction: Null
    reasoning_effort: _NoEffort
    verbosity: UsualVerbosity
    web_search_options: Null
