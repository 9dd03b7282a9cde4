"""The stages. Importing this package makes every built-in operator known by its name; its module is imported when it is
used. None of them imports torch until it runs."""

from importlib import import_module
from types import ModuleType

from ..graph.registry import declare
from ..runtime.flow.operator import ERROR_PORT, Operator, OperatorConfig, Outlet, Port, RecordKind, operator
from .functions import register_function

_STAGES = ["tokenize", "guide", "kv_lookup", "schedule", "prefill", "kv_commit", "decode", "detokenize", "metrics"]
_STAGES += ["filter", "map", "merge", "sage_map", "tee"]
_SOURCES = ["call_source", "file_tail_source", "http_source", "jsonl_source", "stdin_source", "tcp_source"]
_SOURCES += ["unix_source", "websocket_source"]
_SINKS = ["jsonl_sink", "reply_sink", "stdout_sink", "tcp_sink"]
_MODULES = {
    name: f"{__name__}{folder}.{name}"
    for folder, names in (("", _STAGES), (".sources", _SOURCES), (".sinks", _SINKS))
    for name in names
}

declare(_MODULES)

__all__ = [
    "ERROR_PORT",
    "Operator",
    "OperatorConfig",
    "Outlet",
    "Port",
    "RecordKind",
    "operator",
    "register_function",
]


def __getattr__(name: str) -> ModuleType:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(_MODULES[name])
