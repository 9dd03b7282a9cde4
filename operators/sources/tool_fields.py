"""The fields of a request that say which functions the model may call, in OpenAI's form."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Required

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from ...errors import RequestError
from ...records import ToolChoice

_STRICT = ConfigDict(extra="forbid", strict=True)
_OPEN = ConfigDict(extra="allow", strict=True)  # chat templates may know more

FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


@with_config(_STRICT)
class Function(TypedDict, total=False):
    name: Required[FunctionName]
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool | None


@with_config(_STRICT)
class Tool(TypedDict):
    type: Literal["function"]
    function: Function


@with_config(_STRICT)
class FunctionReference(TypedDict):
    name: FunctionName


@with_config(_STRICT)
class ToolReference(TypedDict):
    type: Literal["function"]
    function: FunctionReference


class ToolFields(TypedDict, total=False):
    tools: list[Tool] | None
    tool_choice: Literal["none", "auto", "required"] | ToolReference | None
    parallel_tool_calls: bool | None


@with_config(_OPEN)
class CalledFunction(TypedDict, total=False):
    name: Required[str]
    arguments: str | dict[str, Any] | None


@with_config(_OPEN)
class CalledTool(TypedDict, total=False):
    """A call in a message of the assistant's."""

    id: str
    function: Required[CalledFunction]


def tools_from_fields(fields: dict[str, Any]) -> tuple[list[dict[str, Any]] | None, ToolChoice]:
    """The tools of checked fields, None if none may be called, and how they are to be used.

    Raises:
        RequestError: the fields do not go together.
    """
    tools, wanted = fields.get("tools"), fields.get("tool_choice")
    if not tools:
        if wanted is not None and wanted not in ("none", "auto"):
            raise RequestError("found tool_choice without tools: write tools, or leave it out", "tool_choice")
        return None, ToolChoice()
    names = [tool["function"]["name"] for tool in tools]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RequestError(f"tools: found two functions {twice[0]!r}: write different names", "tools")
    name = None if wanted is None or isinstance(wanted, str) else wanted["function"]["name"]
    if name is not None and name not in names:
        raise RequestError(f"tool_choice: no tool {name!r}: write one of {', '.join(names)}", "tool_choice")
    required = name is not None or wanted == "required"
    if wanted == "none":
        return None, ToolChoice()
    plain = [{**tool, "function": _without_nulls(tool["function"])} for tool in tools]
    return plain, ToolChoice(required, name, fields.get("parallel_tool_calls") is not False)


def _without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
