"""Fields of vLLM's requests that are no parameters here: each is taken with the values that ask for nothing."""

from __future__ import annotations

from typing import Annotated, Any

from typing_extensions import TypedDict

from .openai_fields import EmptyList, Null, Off, only

_GUIDED_JSON = 'write response_format {"type": "json_schema", "json_schema": {"schema": ...}}'
_GUIDED_CHOICE = 'write guided_regex: "(yes|no)"'
_STRUCTURED = "write response_format, guided_regex or guided_grammar"
Empty = Annotated[Any, only({})]


class VLLMFields(TypedDict, total=False):
    """Special tokens are no part of a text here, and outputs are sampled, never searched for."""

    skip_special_tokens: Annotated[Any, only(True, why="a text has no special tokens: write true, or leave it out")]
    spaces_between_special_tokens: bool | None
    include_stop_str_in_output: Off
    return_token_ids: Off
    return_tokens_as_token_ids: Off
    use_beam_search: Off
    early_stopping: Off
    length_penalty: Annotated[Any, only(1.0, 1)]
    allowed_token_ids: Null
    bad_words: EmptyList
    logits_processors: EmptyList
    truncate_prompt_tokens: Annotated[Any, only(why="a prompt that is too long is refused: cut it, and leave it out")]
    prompt_embeds: Null
    mm_processor_kwargs: Empty
    kv_transfer_params: Empty
    vllm_xargs: Empty
    request_id: Annotated[Any, only(why="write the header X-Request-Id, or a batch line's custom_id")]
    guided_json: Annotated[Any, only(why=_GUIDED_JSON)]
    guided_choice: Annotated[Any, only(why=_GUIDED_CHOICE)]
    structured_outputs: Annotated[Any, only(why=_STRUCTURED)]


class VLLMChatFields(VLLMFields, total=False):
    """The chat template is the model's own, and begins the answer."""

    chat_template: Null
    documents: EmptyList
    add_generation_prompt: Annotated[Any, only(True)]
    continue_final_message: Off
    add_special_tokens: Annotated[Any, only(False, why="the chat template writes special tokens: leave it out")]


class VLLMCompletionFields(VLLMFields, total=False):
    """A text gets the tokenizer's special tokens."""

    add_special_tokens: Annotated[Any, only(True, why="write the prompt as token ids, or leave it out")]
