"""Tool calls: how messages and tools reach a chat template, and how calls are read from what a model writes."""

from .formats import ToolFormat, detect_tool_format
from .grammar import answer_or_call_grammar, forced_call_grammar, free_call_grammar
from .messages import to_template_messages
from .parser import ToolCallParser

__all__ = [
    "ToolCallParser",
    "ToolFormat",
    "answer_or_call_grammar",
    "detect_tool_format",
    "forced_call_grammar",
    "free_call_grammar",
    "to_template_messages",
]
