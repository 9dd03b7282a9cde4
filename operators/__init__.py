"""The stages. Importing this package registers every built-in operator; none of them imports torch until it runs."""

from ..runtime.flow.operator import ERROR_PORT, Operator, OperatorConfig, Outlet, Port, RecordKind, operator
from . import (
    decode,
    detokenize,
    filter,
    guide,
    kv_commit,
    kv_lookup,
    map,
    merge,
    metrics,
    prefill,
    sage_map,
    schedule,
    tee,
    tokenize,
)
from .functions import register_function
from .sinks import jsonl_sink, reply_sink, stdout_sink, tcp_sink
from .sources import call_source, http_source, jsonl_source, stdin_source, tcp_source, unix_source, websocket_source

__all__ = [
    "ERROR_PORT",
    "Operator",
    "OperatorConfig",
    "Outlet",
    "Port",
    "RecordKind",
    "call_source",
    "decode",
    "detokenize",
    "filter",
    "guide",
    "http_source",
    "jsonl_sink",
    "jsonl_source",
    "kv_commit",
    "kv_lookup",
    "map",
    "merge",
    "metrics",
    "operator",
    "prefill",
    "register_function",
    "reply_sink",
    "sage_map",
    "schedule",
    "stdin_source",
    "stdout_sink",
    "tcp_sink",
    "tcp_source",
    "tee",
    "tokenize",
    "unix_source",
    "websocket_source",
]
