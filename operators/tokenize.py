"""tokenize: what a user sent becomes token ids and complete sampling parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio

from ..config import InferenceMode
from ..errors import RequestError
from ..models.tool_calls import answer_or_call_grammar, forced_call_grammar, free_call_grammar
from ..records import DeadLetter, Guide, GuideKind, Pooling, Request, SamplingParams, Sequence
from ..runtime.flow.operator import ERROR_PORT, Operator, OperatorConfig, Outlet, Port, RecordKind, operator
from ..runtime.worker.sampling_checks import check_sampling

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_CHARACTERS_WORTH_A_THREAD = 20_000  # about 2 ms of encoding
_NOTHING = SamplingParams(max_new_tokens=0).with_defaults()


@operator("tokenize")
class Tokenize(Operator[OperatorConfig]):
    """Turns a request's text, chat messages or token ids into a sequence of token ids.

    Text gets the tokenizer's special tokens; messages go through the checkpoint's chat template, which writes its
    own; ids are taken as they are. Sampling parameters that the request leaves open come from the model's
    generation_config.json, and `max_new_tokens` is cut to what the model's context leaves after the prompt.

    Guarantee: each request leaves exactly once, in order: on `out`, or on `error` if it is empty, not valid text,
    does not fit the chat template, names ids outside the vocabulary, asks for sampling that is impossible, or is too
    long for the model to add a token.
    """

    inputs = (Port("in", frozenset({RecordKind.REQUEST})),)
    outputs = (Port("out", frozenset({RecordKind.SEQUENCE})), ERROR_PORT)
    provides = frozenset({"tokenized"})
    guarantee = "each request leaves exactly once, in order, on `out` or `error`"
    example = "tokenize: {}"

    async def open(self) -> None:
        engine = self.context.engine
        self._tokenizer = engine.tokenizer
        self._model = engine.model
        self._last_sampling: tuple[SamplingParams, SamplingParams] | None = None

    async def process(self, records: list[Request], out: Outlet) -> None:
        encoded = await self._encode(records)
        sequences: list[Sequence] = []
        letters: list[DeadLetter] = []
        for request, ids in zip(records, encoded, strict=True):
            try:
                sequences.append(self._build(request, ids))
            except RequestError as error:
                letters.append(DeadLetter.refusing(request, error))
        if sequences:
            await out.send(sequences)
        if letters:
            await out.reject(letters)

    async def _encode(self, records: list[Request]) -> list[list[int] | RequestError]:
        """The ids of each request, or why there are none. Texts go to the tokenizer in one batch."""
        results: list[list[int] | RequestError] = [[]] * len(records)
        plain: list[tuple[int, str]] = []
        chats: list[tuple[int, str]] = []
        for index, request in enumerate(records):
            if request.prompt_tokens is not None:
                results[index] = request.prompt_tokens
            elif request.messages is not None:
                try:
                    chats.append((index, self._render_chat(request)))
                except RequestError as error:
                    results[index] = error
            else:
                plain.append((index, request.prompt or ""))
        for texts, add_special_tokens in ((plain, True), (chats, False)):
            if sum(len(text) for _, text in texts) > _CHARACTERS_WORTH_A_THREAD:
                encoded = await anyio.to_thread.run_sync(self._encode_texts, texts, add_special_tokens)
            else:
                encoded = self._encode_texts(texts, add_special_tokens)
            for (index, _), ids in zip(texts, encoded, strict=True):
                results[index] = ids
        return results

    def _render_chat(self, request: Request) -> str:
        assert request.messages is not None
        variables = request.template_variables or {}
        if not request.tools:
            return self._tokenizer.render_chat(request.messages, **variables)
        tools = [_as_taught(tool) for tool in request.tools]
        text = self._tokenizer.render_chat(request.messages, tools=tools, **variables)
        self._prepare_calls(request, request.tools)
        return text

    def _prepare_calls(self, request: Request, tools: list[dict[str, Any]]) -> None:
        """See that calls will be understood and, where one is required or has to conform, what the output must be."""
        tool_format = self._tokenizer.tool_format
        if tool_format is None:
            raise RequestError("this model's chat template has calls written in a form that is not known here", "tools")
        choice, control_ids, guide = request.tool_choice, self._tokenizer.control_ids, request.guide
        if guide is not None and guide.kind is GuideKind.TOOL_CALL:  # a request that has been here before
            return
        if choice.required:
            grammar = forced_call_grammar(tool_format, tools, control_ids, choice.name, choice.parallel)
        elif guide is not None:
            if tool_format.bare:
                told = "found tools and response_format, but this model's calls are JSON as its answers are: write one"
                raise RequestError(told, "response_format")
            from ..models.guide_compiler import json_rule  # numpy, which what only declares the stage does without

            answer = json_rule(guide)
            grammar = answer_or_call_grammar(tool_format, tools, control_ids, answer, choice.parallel)
        elif any(tool["function"].get("strict") for tool in tools):
            grammar = free_call_grammar(tool_format, tools, control_ids, choice.parallel)
        else:
            return
        request.guide = Guide(GuideKind.TOOL_CALL, grammar)

    def _encode_texts(self, texts: list[tuple[int, str]], add_special_tokens: bool) -> list[list[int] | RequestError]:
        if not texts:
            return []
        try:
            return [*self._tokenizer.encode_batch([text for _, text in texts], add_special_tokens)]
        except RequestError as error:  # one bad text fails its batch: find it
            if len(texts) == 1:
                return [error]
            return [self._encode_texts([text], add_special_tokens)[0] for text in texts]

    def _build(self, request: Request, ids: list[int] | RequestError) -> Sequence:
        if isinstance(ids, RequestError):
            raise ids
        prompt = self._check_ids(ids)
        room = self._model.max_seq_len - len(prompt)
        wanted = 0 if request.pooling is not None else 1
        if room < wanted:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, and this model's maximum context length is "
                f"{self._model.max_seq_len}: send at most {self._model.max_seq_len - wanted}"
            )
        if request.pooling is not None:
            return Sequence(request, prompt, self._sample_nothing(request))
        sampling = self._complete(request.sampling)
        if self.context.engine.config.inference_mode is InferenceMode.PREFILL_ONLY:
            room = 1
        if sampling.max_new_tokens > room:
            sampling = replace(sampling, max_new_tokens=room, min_tokens=min(sampling.min_tokens, room))
        eos_token_ids = () if sampling.ignore_eos else self._model.generation.eos_token_ids
        return Sequence(request, prompt, sampling, eos_token_ids)

    def _sample_nothing(self, request: Request) -> SamplingParams:
        config = self.context.engine.config
        if request.sampling != SamplingParams():
            raise RequestError("found pooling and sampling parameters: an embedding has no output, leave them out")
        if (
            request.pooling is Pooling.MEAN
            and config.inference_mode is InferenceMode.DECODE_ONLY
            and config.scheduler.on_transfer_failure == "fail"
        ):
            raise RequestError(
                "pooling mean computes every token of the prompt, which decode_only with on_transfer_failure fail "
                "forbids: write pooling last, or have the prompt computed elsewhere"
            )
        return _NOTHING

    def _check_ids(self, ids: list[int]) -> NDArray[np.int32]:
        if len(ids) == 0:
            raise RequestError("the prompt is empty: send at least one token", "prompt")
        import numpy as np

        try:
            array = np.asarray(ids)
        except (ValueError, OverflowError) as error:
            raise RequestError(f"prompt_tokens is not a flat list of integers: {error}") from error
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise RequestError("prompt_tokens is not a flat list of integers: send token ids, as [1, 2, 3]")
        vocab_size = self._model.vocab_size
        unsigned = array.astype(np.int64, copy=False).view(np.uint64)  # in which a negative id is a huge one
        if unsigned.max() >= vocab_size:
            wrong = next(token for token in array.tolist() if not 0 <= token < vocab_size)
            raise RequestError(f"token id {wrong} is not in the vocabulary: send ids from 0 to {vocab_size - 1}")
        return array.astype(np.int32)

    def _complete(self, sampling: SamplingParams) -> SamplingParams:
        """Check the parameters and fill in the model's defaults; requests often ask for the same."""
        if self._last_sampling is not None and self._last_sampling[0] == sampling:
            return self._last_sampling[1]
        check_sampling(sampling, self._model.vocab_size)
        defaults = self._model.generation
        complete = sampling.with_defaults(
            defaults.temperature, defaults.top_k, defaults.top_p, defaults.repetition_penalty
        )
        self._last_sampling = (sampling, complete)
        return complete


def _as_taught(tool: dict[str, Any]) -> dict[str, Any]:
    """What the model is told of a tool: `strict` is for us, and no template's model was taught it."""
    function = {name: value for name, value in tool["function"].items() if name != "strict"}
    return {**tool, "function": function}
