"""detokenize: token ids become text, as they come and at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..models.tool_calls import ToolCallParser
from ..records import Choice, Completion, DeadLetter, RequestMetrics, Sequence, TokenDelta
from ..runtime.flow.operator import ERROR_PORT, Operator, OperatorConfig, Outlet, Port, RecordKind, operator

if TYPE_CHECKING:
    from ..models.tokenizer import TextTokenizer
    from ..records import Record, Request, ToolCall

_STREAMS_BEFORE_A_SWEEP = 1024


@operator("detokenize")
class Detokenize(Operator[OperatorConfig]):
    """Gives deltas their text and turns a finished sequence into its completion, with its measured times.

    A delta never holds half a character, nor any part of a stop string; what is held back comes with a later delta,
    at the latest with one that has no tokens, just before the completion. The text ends before the stop string or
    stop token that ended it, while `output_tokens` keeps every token. Where the request has tools, calls of them are
    told apart from the text: each comes whole in a delta, once it is certain that it is one.

    Guarantee: one completion for each sequence, in order, or a dead letter if an operator before marked an error on it;
    the texts of a choice's deltas, joined, are its final text.
    """

    inputs = (Port("in", frozenset({RecordKind.SEQUENCE, RecordKind.DELTA})),)
    outputs = (Port("out", frozenset({RecordKind.DELTA, RecordKind.COMPLETION})), ERROR_PORT)
    requires = frozenset({"decoded"})
    guarantee = "one completion for each sequence, in order; a choice's deltas joined are its final text"
    example = "detokenize: {}"

    async def open(self) -> None:
        self._tokenizer = self.context.engine.tokenizer
        self._streams: dict[int, tuple[Sequence, dict[int, _ChoiceStream]]] = {}
        self._sweep_above = _STREAMS_BEFORE_A_SWEEP

    async def process(self, records: list[Sequence | TokenDelta], out: Outlet) -> None:
        self._decode_finished([record for record in records if isinstance(record, Sequence)])
        sent: list[Record] = []
        failed: list[DeadLetter] = []
        for record in records:
            if isinstance(record, TokenDelta):
                self._stream_of(record.sequence, record.choice).read(record)
                sent.append(record)
                continue
            if record.error is not None:
                self._streams.pop(id(record), None)
                failed.append(DeadLetter(record.error, src=record.request.src, request=record.request))
                continue
            streams = self._streams.pop(id(record), (record, {}))[1]
            if record.request.tools:
                self._read_calls(record, streams)
            if record.request.stream:
                sent += [delta for choice in record.choices if (delta := self._rest_of(record, choice, streams))]
            sent.append(
                Completion(
                    record.request,
                    record.choices,
                    len(record.prompt_tokens),
                    measure(record),
                    record.prompt_logprobs,
                    record.embedding,
                )
            )
        if len(self._streams) > self._sweep_above:
            self._sweep()
        if sent:
            await out.send(sent)
        if failed:
            await out.reject(failed)

    def _decode_finished(self, sequences: list[Sequence]) -> None:
        with_tools = [sequence for sequence in sequences if sequence.request.tools]
        if with_tools:
            self._decode(with_tools, self._tokenizer.for_tools)
            sequences = [sequence for sequence in sequences if not sequence.request.tools]
        self._decode(sequences, self._tokenizer)

    def _decode(self, sequences: list[Sequence], tokenizer: TextTokenizer) -> None:
        choices = [(choice, sequence) for sequence in sequences for choice in sequence.choices]
        texts = tokenizer.decode_batch([_visible_tokens(choice) for choice, _ in choices])
        for (choice, sequence), text in zip(choices, texts, strict=True):
            matched = choice.stop_matched
            if isinstance(matched, str):
                at = text.find(matched, _earliest_stop(choice, sequence, matched, tokenizer))
                text = text if at < 0 else text[:at]
            choice.text = text

    def _read_calls(self, sequence: Sequence, streams: dict[int, _ChoiceStream]) -> None:
        """Tell calls and text of each choice apart. What its deltas have not had yet waits in its stream."""
        for choice in sequence.choices:
            stream = streams.setdefault(choice.index, _ChoiceStream(self._tokenizer, sequence))
            parser = stream.parser
            assert parser is not None
            rest, end = parser.push(choice.text[stream.emitted :]), parser.finish()
            stream.rest = rest.content + end.content, [*rest.calls, *end.calls]
            choice.text, choice.tool_calls = parser.content, parser.calls

    def _stream_of(self, sequence: Sequence, choice: int) -> _ChoiceStream:
        known = self._streams.get(id(sequence))
        if known is None:
            known = self._streams[id(sequence)] = (sequence, {})
        stream = known[1].get(choice)
        if stream is None:
            stream = known[1][choice] = _ChoiceStream(self._tokenizer, sequence)
        return stream

    def _rest_of(self, sequence: Sequence, choice: Choice, streams: dict[int, _ChoiceStream]) -> TokenDelta | None:
        """A delta with what the earlier ones held back."""
        stream = streams.get(choice.index)
        if stream is not None and stream.parser is not None:
            text, calls = stream.rest
        else:
            text, calls = choice.text[stream.emitted if stream is not None else 0 :], []
        return TokenDelta(sequence, choice.index, [], text, calls) if text or calls else None

    def _sweep(self) -> None:
        """Forget the streams of sequences that failed on their way and will never finish here."""
        for key, (sequence, _) in list(self._streams.items()):
            if sequence.error is not None:
                del self._streams[key]
        self._sweep_above = max(_STREAMS_BEFORE_A_SWEEP, 2 * len(self._streams))


class _ChoiceStream:
    """What one choice has emitted, and the text and token that are held back."""

    __slots__ = (
        "_decoder",
        "_held",
        "_held_token",
        "_stop",
        "_stop_tokens",
        "_too_early",
        "_waiting",
        "emitted",
        "parser",
        "rest",
    )

    def __init__(self, tokenizer: TextTokenizer, sequence: Sequence) -> None:
        sampling = sequence.sampling
        self.parser = _make_parser(tokenizer, sequence.request)
        self.rest: tuple[str, list[ToolCall]] = ("", [])  # of content and calls, at the end
        self._decoder = (tokenizer if self.parser is None else tokenizer.for_tools).stream()
        self._stop = sampling.stop
        self._stop_tokens = frozenset((*sampling.stop_token_ids, *sequence.eos_token_ids))
        self._too_early = sampling.min_tokens - 1  # tokens whose text may hold a stop string
        self._held = ""  # decoded, but may be the beginning of a stop string
        self._held_token: int | None = None  # a stop token is no text if it is the last
        self._waiting = False  # a stop string was seen: the end decides what is text
        self.emitted = 0  # characters, those of calls included

    def read(self, delta: TokenDelta) -> None:
        """Take a delta's tokens and set its text."""
        tokens = delta.tokens
        if self._stop_tokens and tokens:
            if self._held_token is not None:
                tokens = [self._held_token, *tokens]
                self._held_token = None
            if tokens[-1] in self._stop_tokens:
                self._held_token = tokens[-1]
                tokens = tokens[:-1]
        delta.text = self._decoder.push(tokens) if not self._stop else self._filter(tokens)
        self.emitted += len(delta.text)
        if self.parser is not None:
            delta.text, delta.tool_calls = self.parser.push(delta.text)

    def _filter(self, tokens: list[int]) -> str:
        early = min(len(tokens), max(0, self._too_early))
        self._too_early -= len(tokens)
        old = self._decoder.push(tokens[:early]) if early else ""
        text = self._held + old + self._decoder.push(tokens[early:])
        if self._waiting:
            return ""
        allowed = len(self._held) + len(old) if early else 0  # a stop string that ends here does not count
        cut = min(
            (at for stop in self._stop if (at := text.find(stop, max(0, allowed - len(stop) + 1))) >= 0), default=None
        )
        if cut is None:
            cut = len(text) - max(_overlap(text, stop) for stop in self._stop)
        else:
            self._waiting = True
        self._held = text[cut:]
        return text[:cut]


def _make_parser(tokenizer: TextTokenizer, request: Request) -> ToolCallParser | None:
    if not request.tools:
        return None
    assert tokenizer.tool_format is not None  # tokenize has refused the others
    names = [tool["function"]["name"] for tool in request.tools]
    return ToolCallParser(tokenizer.tool_format, names, None if request.tool_choice.parallel else 1)


def _earliest_stop(choice: Choice, sequence: Sequence, matched: str, tokenizer: TextTokenizer) -> int:
    """Where a stop string may begin: one that was complete before `min_tokens` tokens is text."""
    early = sequence.sampling.min_tokens - 1
    if early < 1:
        return 0
    return max(0, len(tokenizer.stream().push(choice.output_tokens[:early])) - len(matched) + 1)


def measure(sequence: Sequence) -> RequestMetrics:
    """A finished sequence's times in milliseconds; TPOT is over the longest choice."""
    timings, arrival = sequence.timings, sequence.request.arrival
    metrics = RequestMetrics(prefix_hit_tokens=sequence.prefix_hit_tokens, unexported_tokens=sequence.unexported_tokens)
    if timings.scheduled is not None:
        metrics.queue_ms = (timings.scheduled - arrival) * 1000
    if timings.first_token is not None:
        metrics.ttft_ms = (timings.first_token - arrival) * 1000
        count = max(len(choice.output_tokens) for choice in sequence.choices)
        if timings.last_token is not None and count > 1:
            metrics.tpot_ms = (timings.last_token - timings.first_token) / (count - 1) * 1000
    ended = timings.finished if timings.finished is not None else timings.last_token
    if ended is not None:
        metrics.e2e_ms = (ended - arrival) * 1000
    return metrics


def _visible_tokens(choice: Choice) -> list[int]:
    tokens = choice.output_tokens
    if isinstance(choice.stop_matched, int) and tokens and tokens[-1] == choice.stop_matched:
        return tokens[:-1]
    return tokens


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`, without being all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
