"""A response as a stream of events, which tell what it gains and, at the end, all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic_core import to_json

from ....records import FinishReason
from .logprobs import LogprobReader, chat_logprobs
from .response_object import call_item, end_response, fail_response, message_item, new_id, text_part

if TYPE_CHECKING:
    from ....records import TokenDelta, ToolCall
    from .call import Call
    from .errors import HTTPError
    from .replies import Reply
    from .response_object import FunctionCall, OutputLogprob, OutputMessage, Response, Status


class ResponseEvents:
    """Writes the events of one response. A message ends where a call begins; a call comes whole."""

    def __init__(self, call: Call, response: Response, with_logprobs: bool) -> None:
        self._response = response
        self._tokenizer = call.service.tokenizer if with_logprobs else None
        self._reader: LogprobReader | None = None
        self._number = 0  # of the next event
        self._output: list[OutputMessage | FunctionCall] = []  # what has ended
        self._message: _OpenMessage | None = None

    def take(self, index: int, reply: Reply) -> bytes:
        deltas, reply.deltas = reply.deltas, []
        parts: list[bytes] = []
        if self._number == 0:
            parts += [self._event(f"response.{what}", response=self._response) for what in ("created", "in_progress")]
        for delta in deltas:
            logprobs = self._read_logprobs(delta)
            if delta.text or logprobs:
                parts += self._say(delta.text, logprobs)
            for called in delta.tool_calls:
                parts += [*self._end_message("completed"), *self._call(called)]
        return b"".join(parts)

    def finish(self, replies: list[Reply]) -> bytes:
        completion = replies[0].completion
        assert completion is not None
        (choice,) = completion.choices
        parts: list[bytes] = []
        if self._reader is not None and self._tokenizer is not None and (rest := self._reader.read_rest(choice)):
            parts += self._say("", chat_logprobs(rest, self._tokenizer)["content"])
        if not self._output and self._message is None:
            parts += self._say("", [])
        parts += self._end_message("incomplete" if choice.finish_reason is FinishReason.LENGTH else "completed")
        response = end_response(self._response, completion, self._output)
        return b"".join([*parts, self._event(f"response.{response['status']}", response=response)])

    def fail(self, failure: HTTPError) -> bytes:
        parts = self._end_message("incomplete")
        response = fail_response(self._response, failure, self._output)
        return b"".join([*parts, self._event("response.failed", response=response)])

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), to_json(data))

    def _read_logprobs(self, delta: TokenDelta) -> list[OutputLogprob]:
        if self._tokenizer is None:
            return []
        if self._reader is None:
            self._reader = LogprobReader(delta.sequence)
        entries = self._reader.read(delta.sequence.choices[delta.choice], delta.tokens)
        logprobs: list[OutputLogprob] = chat_logprobs(entries, self._tokenizer)["content"]
        return logprobs

    def _say(self, text: str, logprobs: list[OutputLogprob]) -> list[bytes]:
        """Add to the message, which begins if there is none."""
        parts: list[bytes] = []
        message = self._message
        if message is None:
            message = self._message = _OpenMessage(len(self._output))
            item = message_item(message.item_id, "in_progress", [])
            parts.append(self._event("response.output_item.added", output_index=message.index, item=item))
            part = text_part("", [])
            parts.append(self._event("response.content_part.added", **message.place, part=part))
        message.texts.append(text)
        message.logprobs += logprobs
        parts.append(self._event("response.output_text.delta", **message.place, delta=text, logprobs=logprobs))
        return parts

    def _end_message(self, status: Status) -> list[bytes]:
        message, self._message = self._message, None
        if message is None:
            return []
        text, logprobs, place = "".join(message.texts), message.logprobs, message.place
        part = text_part(text, logprobs)
        item = message_item(message.item_id, status, [part])
        self._output.append(item)
        return [
            self._event("response.output_text.done", **place, text=text, logprobs=logprobs),
            self._event("response.content_part.done", **place, part=part),
            self._event("response.output_item.done", output_index=message.index, item=item),
        ]

    def _call(self, called: ToolCall) -> list[bytes]:
        item_id, index = new_id("fc"), len(self._output)
        begun, item = (call_item(item_id, called, status) for status in ("in_progress", "completed"))
        self._output.append(item)
        place = {"item_id": item_id, "output_index": index}
        arguments, kind = called.arguments, "response.function_call_arguments"
        return [
            self._event("response.output_item.added", output_index=index, item=begun),
            self._event(f"{kind}.delta", **place, delta=arguments),
            self._event(f"{kind}.done", **place, name=called.name, arguments=arguments),
            self._event("response.output_item.done", output_index=index, item=item),
        ]


class _OpenMessage:
    """The message that the model is writing; `index` is its place in the output."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.item_id = new_id("msg")
        self.place = {"item_id": self.item_id, "output_index": index, "content_index": 0}
        self.texts: list[str] = []
        self.logprobs: list[OutputLogprob] = []
