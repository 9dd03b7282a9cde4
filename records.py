"""What flows along the edges of a pipeline.

    Request ──tokenize──> Sequence ──decode──> TokenDelta* and the finished Sequence ──detokenize──> Completion
       └───────────────── any stage may turn a record into a DeadLetter on its error port ─────────────┘

A record belongs to one operator at a time; an operator that sends it on must not touch it again. All times are
`time.monotonic()` seconds. Token ids are int32 numpy arrays inside the engine and plain lists at its edges.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .errors import RequestError


class FinishReason(StrEnum):
    """Why a sequence ended. The first two are a normal end."""

    STOP = "stop"  # end-of-sequence token, stop token id or stop string
    LENGTH = "length"  # max_new_tokens, or the model's context or the KV pool is full
    CANCELLED = "cancelled"
    QUEUE_TIMEOUT = "queue_timeout"  # no lease within queue_timeout_s
    FIRST_TOKEN_TIMEOUT = "first_token_timeout"  # no token within first_token_timeout_s
    TIMEOUT = "timeout"  # not done within request_timeout_s
    ERROR = "error"


class Pooling(StrEnum):
    """Of which hidden states, after the model's final norm, a prompt's embedding is the mean."""

    MEAN = "mean"  # those of all its tokens
    LAST = "last"  # that of its last token


class SourcePosition(NamedTuple):
    """Where a record came from: enough to find the line again and to know that it is the same file."""

    file: str
    line: int  # 1-based
    offset: int  # byte offset of the line's first byte
    fingerprint: str  # of the file's content, see operators/sources/fingerprint.py

    def to_dict(self) -> dict[str, Any]:
        return {"file": self.file, "line": self.line, "offset": self.offset, "fingerprint": self.fingerprint}


NO_LIMIT = 2**31  # as max_new_tokens: as many as fit. More than a request may ask for


@dataclass(slots=True, frozen=True)
class SamplingParams:
    """How the next token is chosen. `None` means "what the model's generation_config.json says".

    With `max_new_tokens` of `NO_LIMIT` an output goes on until the model ends it, or the model's context, or what the
    KV pool holds for one sequence, is full.

    `logprobs=k` asks for the chosen token's logprob and the k most likely alternatives at every output position;
    `prompt_logprobs=k` the same for every prompt position after the first.
    """

    max_new_tokens: int = 128
    min_tokens: int = 0
    temperature: float | None = None  # 0 is greedy
    top_k: int | None = None  # 0 is off
    top_p: float | None = None
    min_p: float = 0.0
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def with_defaults(
        self, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, repetition_penalty: float = 1.0
    ) -> SamplingParams:
        """Return a copy in which no field is `None` for want of a value."""
        if None not in (self.temperature, self.top_k, self.top_p, self.repetition_penalty):
            return self
        return replace(
            self,
            temperature=temperature if self.temperature is None else self.temperature,
            top_k=top_k if self.top_k is None else self.top_k,
            top_p=top_p if self.top_p is None else self.top_p,
            repetition_penalty=repetition_penalty if self.repetition_penalty is None else self.repetition_penalty,
        )


@dataclass(slots=True, frozen=True)
class ToolChoice:
    """How a request's tools are to be used. By default the model decides."""

    required: bool = False  # it must call one
    name: str | None = None  # namely this one
    parallel: bool = True  # it may call several


class GuideKind(StrEnum):
    """What a guide's source is."""

    JSON_OBJECT = "json_object"  # nothing: any JSON object will do
    JSON_SCHEMA = "json_schema"  # the schema, as JSON
    REGEX = "regex"
    GRAMMAR = "grammar"  # Lark, as llguidance reads it
    TOOL_CALL = "tool_call"  # the same, of calls of the request's tools


@dataclass(slots=True, frozen=True)
class Guide:
    """What every output of a request must conform to; equal guides are compiled once."""

    kind: GuideKind
    source: str = ""


@dataclass(slots=True, eq=False)
class Request:
    """One request as a source read it: exactly one of `prompt`, `messages`, `prompt_tokens` is set.

    With `pooling` it asks for the prompt's embedding instead of an output: nothing is sampled.
    """

    request_id: str
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    prompt_tokens: list[int] | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    guide: Guide | None = None
    stream: bool = False  # emit a TokenDelta per step, not only the Completion
    pooling: Pooling | None = None
    tools: list[dict[str, Any]] | None = None  # functions that the model may call, in OpenAI's form
    tool_choice: ToolChoice = ToolChoice()
    template_variables: dict[str, Any] | None = None  # of the chat template, as {"enable_thinking": False}
    tenant: str = ""
    cache_salt: str = ""
    pin: bool = False  # keep its prompt's KV cached until it is unpinned
    unpin: bool = False  # let go of what a request with the same prompt pinned
    priority: int = 0  # larger is sooner; policy `priority` heeds it
    deadline_ms: float | None = None  # wanted by then, counted from `arrival`; policy `deadline` heeds it
    src: SourcePosition | None = None
    interactive: bool = False  # somebody waits for it: the scheduler's timeouts apply
    cancelled: bool = False  # set from any thread; the stages notice
    arrival: float = field(default_factory=time.monotonic)
    raw: str = ""  # the line it was read from, or its beginning: shown in its dead letter
    caller: Any = None  # a runtime.calls.Caller: who waits for its results


@dataclass(slots=True)
class TokenLogprobs:
    """Logprobs at one position: the token that is there, and the most likely ones, best first."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(slots=True)
class ToolCall:
    """The model calls a function; `arguments` is a JSON object, as text."""

    id: str
    name: str
    arguments: str


@dataclass(slots=True, eq=False)
class Choice:
    """One of a request's `n` outputs. `output_tokens` is filled by decode, `text` and `tool_calls` by detokenize.

    The text is without the calls, which are only looked for where the request has tools.
    """

    index: int = 0
    output_tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_matched: str | int | None = None  # the stop string or token id that ended it
    conforms: bool = False  # its tokens are all that its guide allows: nothing may follow
    logprobs: list[TokenLogprobs] | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)


@dataclass(slots=True)
class Timings:
    """When things happened to a sequence; `None` is "not yet"."""

    queued: float | None = None  # entered `schedule`: its queue_timeout_s begins
    scheduled: float | None = None  # got its lease
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """A tokenized request on its way through the engine, with everything that later stages add to it."""

    request: Request
    prompt_tokens: NDArray[np.int32]  # [T]
    sampling: SamplingParams  # no `None` left that means "default"
    eos_token_ids: tuple[int, ...] = ()
    guide: Guide | None = None  # the request's, or its pipeline's, once it has been compiled
    choices: list[Choice] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    embedding: NDArray[np.float32] | None = None  # [hidden], of length 1: where the request asks for pooling
    timings: Timings = field(default_factory=Timings)
    prefix_hit_tokens: int = 0
    unexported_tokens: int | None = None
    kv: Any = None  # a PrefixHint after kv_lookup, the Lease from schedule to the end of decode
    error: str | None = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def ended(self) -> bool:
        """Whether every choice has a finish reason: later stages pass it on untouched."""
        return self.timings.finished is not None


@dataclass(slots=True, eq=False)
class TokenDelta:
    """What one choice of a streaming request gained, in one step or several.

    `text` and `tool_calls` are filled by detokenize.
    """

    sequence: Sequence
    choice: int
    tokens: list[int]
    text: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)  # each of them whole

    @property
    def request_id(self) -> str:
        return self.sequence.request.request_id


@dataclass(slots=True)
class RequestMetrics:
    """Measured, in milliseconds. `queue_ms`, `ttft_ms` and `e2e_ms` begin with the request's arrival, so the first is
    part of the others; `tpot_ms` is the mean over output tokens after the first, 0 with fewer than two.
    `unexported_tokens`, where the prompt's KV was to go to files, are those of its whole blocks that did not."""

    queue_ms: float = 0.0
    ttft_ms: float = 0.0
    tpot_ms: float = 0.0
    e2e_ms: float = 0.0
    prefix_hit_tokens: int = 0
    unexported_tokens: int | None = None

    def to_dict(self) -> dict[str, float | int]:
        exported = {} if self.unexported_tokens is None else {"unexported_tokens": self.unexported_tokens}
        return {
            "queue_ms": round(self.queue_ms, 3),
            "ttft_ms": round(self.ttft_ms, 3),
            "tpot_ms": round(self.tpot_ms, 3),
            "e2e_ms": round(self.e2e_ms, 3),
            "prefix_hit_tokens": self.prefix_hit_tokens,
            **exported,
        }


class Usage(NamedTuple):
    """Counted over all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass(slots=True, eq=False)
class Completion:
    """The terminal record of a request that was computed.

    Its properties are the names of an output line: `text`, `tool_calls`, `output_tokens`, `finish_reason` and
    `logprobs` are the first choice's. `embedding` [hidden], of length 1, is set where the request asked for pooling and
    ended after its prompt was computed; there is one choice then, without tokens.
    """

    request: Request
    choices: list[Choice]
    prompt_length: int
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    embedding: NDArray[np.float32] | None = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def output_length(self) -> int:
        return sum(len(choice.output_tokens) for choice in self.choices)

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def tool_calls(self) -> list[ToolCall]:
        return self.choices[0].tool_calls

    @property
    def output_tokens(self) -> list[int]:
        return self.choices[0].output_tokens

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        return self.choices[0].logprobs

    @property
    def usage(self) -> Usage:
        output_length = self.output_length
        return Usage(self.prompt_length, output_length, self.prompt_length + output_length)

    @property
    def src(self) -> SourcePosition | None:
        return self.request.src


@dataclass(slots=True, eq=False)
class DeadLetter:
    """The terminal record of a request that was not computed, or of a line that is no request.

    `blames_request`: the request itself is at fault, and would fail again; otherwise it met a failure of ours. `param`
    is the first field of it that is wrong, where one is.
    """

    error: str
    raw: str = ""
    src: SourcePosition | None = None
    request: Request | None = None
    blames_request: bool = False
    param: str | None = None

    @classmethod
    def refusing(cls, request: Request, error: RequestError) -> DeadLetter:
        """That of a request which is itself at fault."""
        return cls(str(error), src=request.src, request=request, blames_request=True, param=error.param)

    @property
    def request_id(self) -> str | None:
        return None if self.request is None else self.request.request_id

    @property
    def line(self) -> int | None:
        return None if self.src is None else self.src.line


class KVEventKind(StrEnum):
    """What happened to cached KV."""

    STORED = "stored"  # may be reused from now on
    REMOVED = "removed"  # evicted or expired
    MOVED = "moved"  # copied to another tier, from where it may be reused
    CLEARED = "cleared"  # everything was removed
    LOST = "lost"  # events that nobody read in time


@dataclass(slots=True, eq=False)
class KVEvent:
    """A change of the prefix cache, in whole KV blocks, which belongs to no request.

    `block_hashes` names the blocks from token `start` of a prefix on, each by all tokens up to its end (see
    `kv_runtime.block_hashes`); `parent_hash` is that of the block before. Only what is stored has it and `tokens`; of
    other tiers than hbm only the names are told.
    """

    kind: KVEventKind
    seq: int  # counts a worker's events from 0; of LOST the last one that was lost
    at: float  # seconds since the epoch
    tenant: str = ""
    start: int = 0
    parent_hash: str | None = None
    block_hashes: list[str] = field(default_factory=list)
    tokens: NDArray[np.int32] | None = None  # [blocks * block_size]
    block_size: int = 0
    tier: str = "hbm"  # where the blocks are now, or were until they were removed
    lost: int = 0  # events
    worker: int = 0  # whose KV pool; in mode strict those of the workers for prefill come first

    @property
    def num_blocks(self) -> int:
        return len(self.block_hashes)

    @property
    def request(self) -> None:
        return None


Record = Request | Sequence | TokenDelta | Completion | DeadLetter | KVEvent
