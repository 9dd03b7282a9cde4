"""POST /v1/responses. Nothing is stored: each call says all that the model shall know."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic_core import to_json

from ..request_format import parse_json
from .endpoint import Endpoint
from .replies import Replies
from .response_body import ResponseBody, request_from_response_body
from .response_events import ResponseEvents
from .response_object import Response, begin_response, end_response, output_of
from .streaming import stream_replies

if TYPE_CHECKING:
    from .call import Call


async def answer(call: Call) -> None:
    call.name_after("resp_")
    body = parse_json(ResponseBody, await call.read_json())
    call.service.check_model(body.get("model"))
    request = request_from_response_body(body, call.request_id)
    response = begin_response(call, body)
    replies = Replies(call, [request])
    if request.stream:
        events = ResponseEvents(call, response, with_logprobs=request.sampling.logprobs is not None)
        await stream_replies(call, replies, events)
        return
    with replies:
        (completion,) = await replies.completions()
    await call.answer(200, to_json(end_response(response, completion, output_of(call, completion.choices[0]))))


ENDPOINT = Endpoint(
    "POST", "/v1/responses", "Answer a conversation, in items", answer, Response, ResponseBody, streams=True
)
