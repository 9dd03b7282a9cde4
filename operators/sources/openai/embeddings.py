"""POST /v1/embeddings."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Annotated, Any, Literal, Required

import numpy as np
from pydantic import Field, with_config
from pydantic_core import to_json
from typing_extensions import TypedDict

from ....errors import RequestError
from ..request_format import STRICT, Tokens, parse_json, request_from_body
from .endpoint import Endpoint
from .replies import Replies

if TYPE_CHECKING:
    from ....records import Completion
    from .call import Call

_MOST = 2048  # inputs of one call, as OpenAI has it
_InputText = Annotated[str, Field(min_length=1)]
_Inputs = Annotated[list[_InputText] | list[Tokens], Field(min_length=1, max_length=_MOST)]


@with_config(STRICT)
class EmbeddingsBody(TypedDict, total=False):
    """`pooling` is `mean` over all positions, or that of the `last` token; the embedding's length is always 1."""

    model: str | None
    input: Required[_InputText | Tokens | _Inputs]
    pooling: Literal["mean", "last"] | None
    encoding_format: Literal["float", "base64"] | None
    dimensions: Annotated[int, Field(ge=1)] | None
    user: str | None


class Embedding(TypedDict):
    """`base64` is that of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(TypedDict):
    prompt_tokens: int
    total_tokens: int


class Embeddings(TypedDict):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage


async def answer(call: Call) -> None:
    call.name_after("embd-")
    body = parse_json(EmbeddingsBody, await call.read_json())
    call.service.check_model(body.get("model"))
    width = call.service.engine.model.architecture.hidden_size
    if body.get("dimensions") not in (None, width):
        told = f"dimensions: found {body['dimensions']}, this model's embeddings have {width}"
        raise RequestError(told, "dimensions")
    pooling = body.get("pooling") or "mean"
    requests = [
        request_from_body({"prompt": prompt, "pooling": pooling}, call.request_id) for prompt in _inputs(body["input"])
    ]
    with Replies(call, requests) as replies:
        completions = await replies.completions()
    await call.answer(200, to_json(_to_object(call, completions, body.get("encoding_format") == "base64")))


def _inputs(given: str | list[Any]) -> list[str | list[int]]:
    if isinstance(given, str) or isinstance(given[0], int):
        return [given]
    return given


def _to_object(call: Call, completions: list[Completion], as_base64: bool) -> Embeddings:
    data: list[Embedding] = []
    for index, completion in enumerate(completions):
        assert completion.embedding is not None
        vector = np.asarray(completion.embedding, "<f4")
        told = base64.b64encode(vector.tobytes()).decode() if as_base64 else vector.tolist()
        data.append({"object": "embedding", "index": index, "embedding": told})
    tokens = sum(completion.prompt_length for completion in completions)
    return {
        "object": "list",
        "data": data,
        "model": call.service.model_name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


ENDPOINT = Endpoint("POST", "/v1/embeddings", "Turn texts into vectors", answer, Embeddings, EmbeddingsBody)
