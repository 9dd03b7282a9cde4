"""POST /tokenize and POST /detokenize, with vLLM's fields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Required

import anyio.to_thread
from pydantic import with_config
from pydantic_core import to_json
from typing_extensions import TypedDict

from ....errors import RequestError
from ..request_format import STRICT, Messages, Token, parse_json, plain_messages
from .endpoint import Endpoint

if TYPE_CHECKING:
    from ....models.tokenizer import TextTokenizer
    from .call import Call

_WORTH_A_THREAD = 20_000  # bytes of body, about 2 ms of encoding


@with_config(STRICT)
class TokenizeBody(TypedDict, total=False):
    """`prompt`, or `messages` as the chat template renders them, which writes its own special tokens."""

    model: str | None
    prompt: str | None
    messages: Messages | None
    add_special_tokens: bool | None
    add_generation_prompt: bool | None
    return_token_strs: bool | None


class Tokenization(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


@with_config(STRICT)
class DetokenizeBody(TypedDict, total=False):
    model: str | None
    tokens: Required[list[Token]]


class Detokenization(TypedDict):
    prompt: str


async def tokenize(call: Call) -> None:
    data = await call.read_json()
    body = parse_json(TokenizeBody, data)
    call.service.check_model(body.get("model"))
    call.service.check_ready()
    if len(data) > _WORTH_A_THREAD:
        tokens = await anyio.to_thread.run_sync(_encode, call.service.tokenizer, body)
    else:
        tokens = _encode(call.service.tokenizer, body)
    texts = None
    if body.get("return_token_strs"):
        texts = [call.service.tokenizer.token_bytes(token).decode("utf-8", "replace") for token in tokens]
    found: Tokenization = {
        "count": len(tokens),
        "max_model_len": call.service.engine.model.max_seq_len,
        "tokens": tokens,
        "token_strs": texts,
    }
    await call.answer(200, to_json(found))


def _encode(tokenizer: TextTokenizer, body: dict[str, Any]) -> list[int]:
    prompt, messages = body.get("prompt"), body.get("messages")
    if (prompt is None) == (messages is None):
        raise RequestError("write one of prompt, messages", "prompt")
    if prompt is not None:
        if body.get("add_generation_prompt") is not None:
            raise RequestError("add_generation_prompt needs messages", "add_generation_prompt")
        return tokenizer.encode(prompt, body.get("add_special_tokens") is not False)
    if body.get("add_special_tokens") is not None:
        raise RequestError("messages: the chat template writes special tokens, leave this out", "add_special_tokens")
    generation = body.get("add_generation_prompt") is not False
    return tokenizer.encode_chat(plain_messages(messages or []), add_generation_prompt=generation)


async def detokenize(call: Call) -> None:
    body = parse_json(DetokenizeBody, await call.read_json())
    call.service.check_model(body.get("model"))
    call.service.check_ready()
    vocab_size = call.service.engine.model.vocab_size
    for token in body["tokens"]:
        if token >= vocab_size:
            text = f"token id {token} is not in the vocabulary: send ids from 0 to {vocab_size - 1}"
            raise RequestError(text, "tokens")
    text = await anyio.to_thread.run_sync(call.service.tokenizer.decode, body["tokens"])
    found: Detokenization = {"prompt": text}
    await call.answer(200, to_json(found))


TOKENIZE = Endpoint("POST", "/tokenize", "Turn a text or a conversation into token ids", tokenize, Tokenization,
                    TokenizeBody)  # fmt: skip
DETOKENIZE = Endpoint("POST", "/detokenize", "Turn token ids into text", detokenize, Detokenization, DetokenizeBody)
