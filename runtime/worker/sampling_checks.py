"""Which sampling parameters are meaningful; needs no torch, so a request can be refused before it is scheduled."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ...errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...records import SamplingParams


def check_sampling(params: SamplingParams, vocab_size: int) -> None:
    """Refuse parameters that no step could honour. `None` fields (the model's defaults) pass.

    Raises:
        RequestError: at least one field is out of range; the message names every such field.
    """
    problems = list(_find_problems(params, vocab_size))
    if problems:
        raise RequestError("; ".join(problems))


def _find_problems(params: SamplingParams, vocab_size: int) -> Iterator[str]:
    yield from _find_number_problems(params)
    if params.max_new_tokens < 1:
        yield f"max_new_tokens is {params.max_new_tokens}, write at least 1"
    if not 0 <= params.min_tokens <= params.max_new_tokens:
        yield f"min_tokens is {params.min_tokens}, write 0 to max_new_tokens ({params.max_new_tokens})"
    if params.n < 1:
        yield f"n is {params.n}, write at least 1"
    for name, count in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if count is not None and not 0 <= count <= vocab_size:
            yield f"{name} is {count}, write 0 to the vocabulary's size ({vocab_size})"
    for token, bias in (params.logit_bias or {}).items():
        if not 0 <= token < vocab_size:
            yield f"logit_bias names token {token}, write ids from 0 to {vocab_size - 1}"
        if not math.isfinite(bias):
            yield f"logit_bias of token {token} is {bias}, write a finite number"
    for token in params.stop_token_ids:
        if not 0 <= token < vocab_size:
            yield f"stop_token_ids names token {token}, write ids from 0 to {vocab_size - 1}"
    if "" in params.stop:
        yield "stop holds an empty string, which would stop everything: leave it out"


def _find_number_problems(params: SamplingParams) -> Iterator[str]:
    """Comparisons are written so that NaN fails them."""
    temperature, top_k, top_p, repetition = (
        params.temperature,
        params.top_k,
        params.top_p,
        params.repetition_penalty,
    )
    if temperature is not None and not 0 <= temperature < math.inf:
        yield f"temperature is {temperature}, write 0 (greedy) or more"
    if top_k is not None and top_k < -1:
        yield f"top_k is {top_k}, write 0 (off) or more"
    if top_p is not None and not 0 < top_p <= 1:
        yield f"top_p is {top_p}, write a number above 0 and up to 1 (off)"
    if not 0 <= params.min_p <= 1:
        yield f"min_p is {params.min_p}, write 0 (off) to 1"
    if repetition is not None and not 0 < repetition < math.inf:
        yield f"repetition_penalty is {repetition}, write a number above 0; 1 is off"
    for name, penalty in (
        ("presence_penalty", params.presence_penalty),
        ("frequency_penalty", params.frequency_penalty),
    ):
        if not math.isfinite(penalty):
            yield f"{name} is {penalty}, write a finite number; 0 is off"
