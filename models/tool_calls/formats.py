"""In which form a model writes its calls: told by its chat template."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """Calls are JSON objects with `name` and `arguments_key`, between `opening` and `closing` or without either."""

    name: str
    opening: str  # begins a call, anywhere in the text
    arguments_key: str  # as the model was taught; others' are understood, too
    closing: str = ""
    is_list: bool = False  # after the opening comes a JSON list of calls
    bare: bool = False  # the text may begin with a call, without an opening
    id_length: int = 0  # of a call's id, where the template demands one; 0: any will do

    @property
    def markers(self) -> tuple[str, ...]:
        """What belongs to the form, and may be a special token of the tokenizer's."""
        return tuple(marker for marker in (self.opening, self.closing) if marker)


HERMES = ToolFormat("hermes", "<tool_call>", "arguments", closing="</tool_call>")
LLAMA3_JSON = ToolFormat("llama3_json", "<|python_tag|>", "parameters", bare=True)
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", "arguments", is_list=True, id_length=9)

_OTHER_HERMES = ("<function=", "<arg_key>")  # the same tags around XML: Qwen3-Coder, GLM
_OTHER_MISTRAL = ("[ARGS]", "[CALL_ID]")


def detect_tool_format(template: str) -> ToolFormat | None:
    """The form that a chat template teaches its model; None if it is none of those that are known here."""
    if "<tool_call>" in template:
        return None if any(other in template for other in _OTHER_HERMES) else HERMES
    if "[TOOL_CALLS]" in template:
        return None if any(other in template for other in _OTHER_MISTRAL) else MISTRAL
    if '"parameters": ' in template and ("<|python_tag|>" in template or "ipython" in template):
        return LLAMA3_JSON
    return None
