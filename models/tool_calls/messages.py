"""Messages of OpenAI's form, as chat templates expect them."""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json

from ...errors import RequestError


def to_template_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with each call's arguments as an object, not as JSON text, and the name of its function in the
    message that answers it. What is null in a message is left out.

    Raises:
        RequestError: the arguments are no JSON object.
    """
    names: dict[str, str] = {}
    rendered = []
    for index, given in enumerate(messages):
        message = {key: value for key, value in given.items() if value is not None and value != []}
        if message.get("tool_calls"):
            calls = [
                _to_template_call(call, f"messages.{index}.tool_calls.{number}")
                for number, call in enumerate(message["tool_calls"])
            ]
            names |= {call["id"]: call["function"]["name"] for call in calls if "id" in call}
            message |= {"content": message.get("content", ""), "tool_calls": calls}
        elif message.get("role") == "tool" and message.get("tool_call_id") in names:
            message.setdefault("name", names[message["tool_call_id"]])
        rendered.append(message)
    return rendered


def _to_template_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = from_json(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise RequestError(f"{where}.function.arguments: not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise RequestError(f"{where}.function.arguments: found {arguments!r:.40}, write a JSON object")
    return {**call, "function": {**function, "arguments": arguments}}
