"""Traces of requests: JSON lines as Mooncake publishes them, or plain ones.

A line of Mooncake's (https://github.com/kvcache-ai/Mooncake) has a `timestamp` in milliseconds, `input_length` and
`output_length` in tokens, and `hash_ids`, which name the blocks of 512 tokens of its prompt; equal ids are equal blocks
after equal prefixes. A plain line has no ids; `prompt_tokens`, their number or the tokens themselves, and
`max_new_tokens` are other names of the lengths; `tenant`, `priority` and `deadline_ms` are those of a request.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..errors import ConfigError
from ..records import Request, SamplingParams, Sequence

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    Int32Array = NDArray[np.int32]
    Int64Array = NDArray[np.int64]

T = TypeVar("T")

HASH_BLOCK = 512  # tokens
_FIRST_ID = 1 << 24  # above every vocabulary: the tokens that stand for blocks and for outputs


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One line. Of its prompt the tokens are known, or the `blocks` by their ids, or only the length."""

    at_s: float
    prompt_length: int
    output_length: int
    tokens: Int32Array | None = None
    blocks: Int64Array | None = None
    tenant: str = ""
    priority: int = 0
    deadline_ms: float | None = None


class _Wrong(Exception):
    """What was found in a line, and what to write instead."""

    def __init__(self, found: str, instead: str) -> None:
        super().__init__(f"found {found}, write {instead}")


def read_block_ids(path: Path) -> list[Int32Array]:
    """Return each request's block ids, numbered anew from 0, in the order of the trace.

    Raises:
        ConfigError: the file cannot be read, a line is no request of such a trace, or none asks for a block.
    """
    requests = _read_lines(path, _read_block_ids, '{"hash_ids": [0, 1]}')
    joined = np.concatenate([np.empty(0, np.int64), *requests])
    if not joined.size:
        raise ConfigError(f'{path}: no block to look up: give a file with a line {{"hash_ids": [0, 1]}} per request')
    _, numbers = np.unique(joined, return_inverse=True)
    return np.split(numbers.astype(np.int32), np.cumsum([ids.size for ids in requests])[:-1])


def read_requests(path: Path) -> list[TraceRequest]:
    """Return the requests of a trace by the time of their arrival.

    Raises:
        ConfigError: the file cannot be read, a line is no request, or there is none.
    """
    requests = _read_lines(path, _read_request, '{"timestamp": 0, "input_length": 600, "output_length": 20}')
    if not requests:
        raise ConfigError(
            f'{path}: found no request, write a line for each: {{"timestamp": 0, "input_length": 600, "output_length": '
            f'20, "hash_ids": [0, 1]}}; ids of {HASH_BLOCK} tokens each, tenant, priority and deadline_ms need not be'
        )
    return sorted(requests, key=lambda request: request.at_s)


def _read_lines(path: Path, read: Callable[[dict[str, Any]], T], example: str) -> list[T]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    values = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values.append(read(_parse(line, example)))
        except _Wrong as wrong:
            raise ConfigError(f"{path}:{number}: {wrong}") from None
    return values


def _parse(line: bytes, example: str) -> dict[str, Any]:
    text = line.decode("utf-8", "replace")
    try:
        value = json.loads(line)
    except ValueError as error:
        raise _Wrong(f"{_shorten(text)}, which is no JSON ({error})", f"an object like {example}") from error
    if not isinstance(value, dict):
        raise _Wrong(_shorten(text), f"an object like {example}")
    return value


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}..."


def _read_block_ids(line: dict[str, Any]) -> Int64Array:
    return _ids("hash_ids", line.get("hash_ids"), 2**63, "[0, 1]")


def _ids(name: str, ids: Any, end: int, example: str) -> Int64Array:
    if not isinstance(ids, list):
        found = f"no {name}" if ids is None else f"{name}: {_shorten(json.dumps(ids))}"
        raise _Wrong(found, f'"{name}": {example}')
    for each in ids:
        if type(each) is not int or not 0 <= each < end:
            raise _Wrong(f"{_shorten(json.dumps(each))} in {name}", f"integers from 0 to {end - 1}")
    return np.array(ids, np.int64)


def _length(line: dict[str, Any], name: str, other: str) -> int:
    given = other if other in line else name
    if given not in line:
        raise _Wrong(f"no {name}", f'"{name}": 20, a number of tokens')
    value = line[given]
    if type(value) is not int or not 0 < value < 2**31:
        raise _Wrong(f"{given}: {_shorten(json.dumps(value))}", "a number of tokens, at least 1")
    return value


def _milliseconds(line: dict[str, Any], name: str) -> float:
    value = line[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise _Wrong(f"{name}: {_shorten(json.dumps(value))}", "milliseconds, at least 0")
    return float(value)


def _read_request(line: dict[str, Any]) -> TraceRequest:
    if "timestamp" not in line:
        raise _Wrong("no timestamp", '"timestamp": 0, the milliseconds at which it arrives')
    at_s = _milliseconds(line, "timestamp") / 1000
    output = _length(line, "output_length", "max_new_tokens")
    tokens = blocks = None
    if isinstance(line.get("prompt_tokens"), list):
        tokens = _ids("prompt_tokens", line["prompt_tokens"], _FIRST_ID, "[5, 6, 7]").astype(np.int32)
        prompt = len(tokens)
        if not prompt:
            raise _Wrong("prompt_tokens: []", "at least one token")
    else:
        prompt = _length(line, "input_length", "prompt_tokens")
        if line.get("hash_ids") is not None:
            blocks = _read_block_ids(line)
            if blocks.size * HASH_BLOCK < prompt:
                needed = -(-prompt // HASH_BLOCK)
                found = f"{blocks.size} hash_ids for {prompt} tokens"
                raise _Wrong(found, f"{needed}, one for each {HASH_BLOCK} tokens")
    deadline = None if line.get("deadline_ms") is None else _milliseconds(line, "deadline_ms")
    tenant, priority = line.get("tenant", ""), line.get("priority", 0)
    if not isinstance(tenant, str):
        raise _Wrong(f"tenant: {_shorten(json.dumps(tenant))}", 'a name in quotes, like "a"')
    if type(priority) is not int:
        raise _Wrong(f"priority: {_shorten(json.dumps(priority))}", "an integer")
    return TraceRequest(at_s, prompt, output, tokens, blocks, tenant, priority, deadline)


class TraceReplay:
    """The requests of a trace as sequences, as often as asked for.

    A block of 512 tokens is one token id 512 times, a prompt of which only the length is known one that no other has,
    and so is each output: prefixes are equal where the trace says so, and nobody's prompt continues an output. With
    `spread` what the trace has at one moment comes evenly up to its next moment.
    """

    def __init__(self, requests: list[TraceRequest], spread: bool = False) -> None:
        given = [request.blocks for request in requests if request.blocks is not None]
        distinct, numbers = np.unique(np.concatenate([np.empty(0, np.int64), *given]), return_inverse=True)
        parts = iter(np.split(numbers, np.cumsum([blocks.size for blocks in given])[:-1]))
        self._requests = [
            request if request.blocks is None else replace(request, blocks=next(parts)) for request in requests
        ]
        at_s = np.array([request.at_s for request in requests])
        self._at_s = (_spread(at_s) if spread else at_s) - at_s[0]
        self._own = _FIRST_ID + len(distinct)  # of the prompts without blocks
        self._outputs = self._own + len(requests)

    def arrivals(self, rate_scale: float = 1.0) -> Iterator[tuple[float, Sequence]]:
        """Yield when each request arrives, in seconds from the first, and its sequence; the id is its number.

        With `rate_scale` 2 they come twice as fast. Somebody waits for each: the scheduler's timeouts apply.
        """
        for number, (request, at_s) in enumerate(zip(self._requests, self._at_s.tolist(), strict=True)):
            sampling = SamplingParams(max_new_tokens=request.output_length, temperature=0.0, ignore_eos=True)
            record = Request(
                str(number),
                sampling=sampling,
                tenant=request.tenant,
                priority=request.priority,
                deadline_ms=request.deadline_ms,
                interactive=True,
            )
            yield at_s / rate_scale, Sequence(record, self._prompt(number, request), sampling.with_defaults())

    def _prompt(self, number: int, request: TraceRequest) -> Int32Array:
        if request.tokens is not None:
            return request.tokens
        if request.blocks is None:
            return np.full(request.prompt_length, self._own + number, np.int32)
        return np.repeat((request.blocks + _FIRST_ID).astype(np.int32), HASH_BLOCK)[: request.prompt_length]

    def output_token(self, sequence: Sequence) -> int:
        """The token id that all of a sequence's output is."""
        return self._outputs + int(sequence.request_id)


def _spread(at_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ascending times of which none are equal; those of the last moment come as fast as those of the one before."""
    moments, first, counts = np.unique(at_s, return_index=True, return_counts=True)
    gaps = np.diff(moments)
    pace = np.append(gaps / counts[:-1], gaps[-1] / counts[-2] if len(gaps) else 0.0)
    places = np.arange(len(at_s)) - np.repeat(first, counts)  # among those of one moment
    spread: NDArray[np.float64] = at_s + places * np.repeat(pace, counts)
    return spread
