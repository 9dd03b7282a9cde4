"""Logprobs as OpenAI's two formats tell them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ....models.tokenizer import TextTokenizer
    from ....records import Choice, TokenLogprobs
    from ....records import Sequence as SequenceRecord

_LOWEST = -9999.0  # JSON has no infinity


class LogprobReader:
    """Reads one choice's logprobs as they come. That of a token which ends the choice is not told: it is no text."""

    def __init__(self, sequence: SequenceRecord) -> None:
        self._stop_tokens = frozenset((*sequence.sampling.stop_token_ids, *sequence.eos_token_ids))
        self._told = self._seen = 0

    def read(self, choice: Choice, tokens: list[int]) -> list[TokenLogprobs]:
        """Those of a step's new tokens; the last one waits if it may turn out to be the end."""
        self._seen += len(tokens)
        held = bool(tokens) and tokens[-1] in self._stop_tokens
        return self._up_to(choice, self._seen - held)

    def read_rest(self, choice: Choice) -> list[TokenLogprobs]:
        """Those that are left when the choice has ended."""
        return self._up_to(choice, len(choice.output_tokens) - ends_with_stop_token(choice))

    def _up_to(self, choice: Choice, end: int) -> list[TokenLogprobs]:
        begin, self._told = self._told, max(self._told, end)
        return (choice.logprobs or [])[begin:end]


def ends_with_stop_token(choice: Choice) -> bool:
    """Whether the last token only ended the choice."""
    matched = choice.stop_matched
    return isinstance(matched, int) and bool(choice.output_tokens) and choice.output_tokens[-1] == matched


def visible_logprobs(choice: Choice) -> list[TokenLogprobs] | None:
    """A finished choice's logprobs; None if none were asked for."""
    if choice.logprobs is None:
        return None
    return choice.logprobs[: len(choice.logprobs) - ends_with_stop_token(choice)]


def chat_logprobs(entries: Sequence[TokenLogprobs], tokenizer: TextTokenizer) -> dict[str, Any]:
    """`{"content": [{"token", "logprob", "bytes", "top_logprobs"}], "refusal": null}`."""
    content = [
        {
            **_chat_token(tokenizer, entry.token, entry.logprob),
            "top_logprobs": [_chat_token(tokenizer, *alternative) for alternative in entry.top],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _chat_token(tokenizer: TextTokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, _LOWEST), "bytes": [*data]}


def completion_logprobs(entries: Sequence[TokenLogprobs], tokenizer: TextTokenizer, offset: int = 0) -> dict[str, Any]:
    """`{"tokens", "token_logprobs", "top_logprobs", "text_offset"}`; the first token begins at `offset` characters."""
    tokens = [token_text(tokenizer, entry.token) for entry in entries]
    offsets = []
    for text in tokens:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": tokens,
        "token_logprobs": [max(entry.logprob, _LOWEST) for entry in entries],
        "top_logprobs": [
            {token_text(tokenizer, token): max(logprob, _LOWEST) for token, logprob in entry.top} for entry in entries
        ],
        "text_offset": offsets,
    }


def token_text(tokenizer: TextTokenizer, token: int) -> str:
    """A token as text; half a character is told by its bytes."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def prompt_logprobs(
    entries: Sequence[TokenLogprobs | None] | None, tokenizer: TextTokenizer
) -> list[dict[str, Any] | None] | None:
    """One object for each prompt token, of what could stand there by token id; null for the first."""
    if entries is None:
        return None
    return [
        None
        if entry is None
        else {
            str(token): {"logprob": max(logprob, _LOWEST), "decoded_token": token_text(tokenizer, token)}
            for token, logprob in dict([(entry.token, entry.logprob), *entry.top]).items()
        }
        for entry in entries
    ]
