"""`sagellm bench guide`: what a step costs more when its rows are guided by a JSON schema."""

from __future__ import annotations

import json
from contextlib import closing
from itertools import chain, islice, product
from statistics import median
from string import ascii_lowercase
from typing import TYPE_CHECKING

import numpy as np

from ..backends import detect_backend
from ..models.architecture import parse_architecture
from ..models.guide_compiler import GuideCompiler
from ..models.resolve import GenerationDefaults, ResolvedModel
from ..models.tokenizer import Tokenizer
from ..models.weights import load_model
from ..records import Guide, GuideKind, Request, SamplingParams, Sequence
from ..runtime.worker.torch_executor import TorchExecutor
from .decoding import time_decoding
from .workloads import SHAPES

if TYPE_CHECKING:
    from ..config import BackendConfig

_BLOCK_SIZE = 16
_PROMPT_TOKENS = 32
_ROUNDS = 5
_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "role": {"enum": ["engineer", "manager", "analyst"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}},
    },
    "required": ["name", "age", "role", "tags"],
    "additionalProperties": False,
}
_SCHEMA = {"type": "array", "items": _PERSON, "minItems": 100_000}  # no output ends


def measure_guide(config: BackendConfig, shape: str, rows: int, steps: int) -> dict[tuple[bool, int], float]:
    """Microseconds of a step of `rows` rows at temperature 1, by whether they are guided and how many are launched.

    With one at a time a mask is found while the device waits, with two while it computes. Medians of rounds in turn.

    Raises:
        ConfigError: there is no such device.
    """
    backend = detect_backend(config)
    architecture = parse_architecture(SHAPES[shape])
    model = ResolvedModel(shape, None, architecture, GenerationDefaults(), "dummy", "")
    guides = GuideCompiler(model, lambda: _make_tokenizer(architecture.vocab_size))
    length = -(-(_PROMPT_TOKENS + steps + 1) // _BLOCK_SIZE)
    tables = np.arange(rows * length, dtype=np.int32).reshape(rows, length)
    prompt, sampling = np.full(_PROMPT_TOKENS, 97, np.int32), SamplingParams(seed=1).with_defaults()
    guides_of = {True: Guide(GuideKind.JSON_SCHEMA, json.dumps(_SCHEMA)), False: None}
    asks = {guided: Sequence(Request("r"), prompt, sampling, guide=guide) for guided, guide in guides_of.items()}
    executor = TorchExecutor(load_model(model, backend), backend, tables.size, _BLOCK_SIZE, rows, guides=guides)
    times: dict[tuple[bool, int], list[float]] = {(guided, depth): [] for guided in (False, True) for depth in (1, 2)}
    with closing(executor):
        time_decoding(executor, asks[True], tables, _BLOCK_SIZE, 1, 1)  # which loads what is loaded when it is needed
        for _ in range(_ROUNDS):
            for (guided, depth), found in times.items():
                found.append(time_decoding(executor, asks[guided], tables, _BLOCK_SIZE, steps, depth))
    return {case: median(found) for case, found in times.items()}


def _make_tokenizer(vocab_size: int) -> Tokenizer:
    """Bytes and short runs of letters, half of them with a blank before, in the form of byte-level BPE."""
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import decoders, models, pre_tokenizers

    runs = chain.from_iterable(product(ascii_lowercase, repeat=length) for length in range(2, 6))
    words = ("".join(run) for run in runs)
    pieces = chain(sorted(pre_tokenizers.ByteLevel.alphabet()), chain.from_iterable((w, f"Ġ{w}") for w in words))
    rust = RustTokenizer(models.BPE({piece: id_ for id_, piece in enumerate(islice(pieces, vocab_size))}, []))
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return Tokenizer(rust)
