"""Tokens that a call has used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import TypedDict

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ....records import Completion


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    """`cached_tokens` of the prompt were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


def usage_of(completions: Iterable[Completion]) -> Usage:
    """The sum over all completions."""
    prompt = output = cached = 0
    for completion in completions:
        prompt += completion.prompt_length
        output += completion.output_length
        cached += completion.metrics.prefix_hit_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
