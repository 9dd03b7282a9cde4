"""The endpoints of the API. Another one is a file of its own and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import chat_completions, completions, embeddings, health, models, openapi, responses, tokens

if TYPE_CHECKING:
    from .endpoint import Endpoint

ENDPOINTS: tuple[Endpoint, ...] = (
    chat_completions.ENDPOINT,
    completions.ENDPOINT,
    responses.ENDPOINT,
    embeddings.ENDPOINT,
    models.LIST,
    models.SHOW,
    tokens.TOKENIZE,
    tokens.DETOKENIZE,
    health.HEALTH,
    health.READY,
    openapi.ENDPOINT,
)
