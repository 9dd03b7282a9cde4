"""The stages. Importing this package registers every built-in operator; none of them imports torch until it runs."""

from . import detokenize, metrics, tokenize
from .sinks import jsonl_sink, stdout_sink
from .sources import jsonl_source, stdin_source

__all__ = ["detokenize", "jsonl_sink", "jsonl_source", "metrics", "stdin_source", "stdout_sink", "tokenize"]
