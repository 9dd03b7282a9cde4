"""Guides become matchers: what llguidance knows of a grammar, over the tokens of one model. No torch."""

from __future__ import annotations

import json
import math
import re
import threading
from collections import OrderedDict
from concurrent.futures import Future
from functools import cached_property
from threading import BoundedSemaphore, Lock
from time import thread_time
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..errors import RequestError
from ..records import GuideKind
from .tokenizer import NullTokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from llguidance import LLMatcher, LLTokenizer
    from numpy.typing import NDArray

    from ..records import Guide
    from .resolve import ResolvedModel
    from .tokenizer import TextTokenizer

T = TypeVar("T")

MASK_S = 0.2  # of computing, to find which tokens may follow: ordinary grammars take 5 ms
TOO_SLOW = "it takes too long to find what may follow: write a grammar that is smaller or less ambiguous"
_MAX_GRAMMARS = 256
_MAX_SOURCE = 256 * 1024
_MAX_ITEMS = 25_000  # of the parser for one mask; SQL takes 12000
_MAX_STATES = 50_000  # of a row's lexer, a kilobyte or two each; 10000 characters of a bounded string take 30000
_COMPILED_AT_ONCE = 4
_COMPILE_S = 10.0  # what takes longer is refused, and its thread cannot be ended: it is one of the four until it ends
_STACK_BYTES = 512 * 1024 * 1024  # llguidance recurses over rules: as deep as such a source can make it
_MAX_MULTIPLE = 100_000  # so many states has a lexer of its multiples, whatever llguidance's limits: a second
_MULTIPLE_OF = re.compile(r'"multipleOf"\s*:\s*-?(\d+)(?:\.(\d+))?(?:[eE]([-+]?\d+))?')
_ASCII_ESCAPE = re.compile(r"\\u00([0-7][0-9a-fA-F])")
_WHITESPACE = r"[ \t]{1,2}|\r?\n[ \t]{0,40}"  # between tokens of JSON: bounded, else weak models write nothing else
_OWN_STATE = re.compile("<(?:state|backtrace|non-verbose)")
_NAMES = {
    GuideKind.JSON_OBJECT: "response_format",
    GuideKind.JSON_SCHEMA: "response_format.json_schema.schema",
    GuideKind.REGEX: "guided_regex",
    GuideKind.GRAMMAR: "guided_grammar",
    GuideKind.TOOL_CALL: "tools",
}


class GuideCompiler:
    """Compiles guides for one model, and keeps the 256 that were used last. May be used by several threads."""

    def __init__(self, model: ResolvedModel, load_tokenizer: Callable[[], TextTokenizer]) -> None:
        """Nothing is loaded before the first guide comes."""
        self._model = model
        self._load_tokenizer = load_tokenizer
        self._compiled: OrderedDict[Guide, LLMatcher] = OrderedDict()
        self._lock = Lock()
        self._threads = BoundedSemaphore(_COMPILED_AT_ONCE)

    @property
    def vocab_size(self) -> int:
        """Of the model: so many logits there are."""
        return self._model.vocab_size

    def check(self, guide: Guide) -> None:
        """Compile a guide, unless it is known: takes milliseconds, 20 seconds at the worst.

        Raises:
            RequestError: the grammar is wrong, too large, too ambiguous, takes longer than 10 s to compile, or allows
                no output that has a token; or the model chooses no tokens, or has a tokenizer whose tokens are not
                known as bytes.
        """
        self.new_matcher(guide)

    def knows(self, guide: Guide) -> bool:
        """Whether it is compiled."""
        return guide in self._compiled

    def new_matcher(self, guide: Guide) -> LLMatcher:
        """A matcher of its own for one output, before its first token.

        Raises:
            RequestError: as `check`.
        """
        with self._lock:
            known = self._compiled.get(guide)
            if known is not None:
                self._compiled.move_to_end(guide)
                return known.deep_copy()
        _check_size(guide)
        matcher = self._compile_in_time(guide)
        with self._lock:
            self._compiled[guide] = matcher
            while len(self._compiled) > _MAX_GRAMMARS:
                self._compiled.popitem(last=False)
            return matcher.deep_copy()

    def _compile_in_time(self, guide: Guide) -> LLMatcher:
        _ = self.tokenizer  # the first time it takes seconds, which are no grammar's fault
        if not self._threads.acquire(timeout=_COMPILE_S):
            raise _refusal(
                guide,
                f"it cannot be compiled now: {_COMPILED_AT_ONCE} grammars are under way that each take longer than "
                f"{_COMPILE_S:g} s: ask again later",
            )
        compiling = run_apart(lambda: self._compile(guide))
        compiling.add_done_callback(lambda _: self._threads.release())
        try:
            return compiling.result(_COMPILE_S)
        except TimeoutError:
            raise _refusal(
                guide, f"it takes longer than {_COMPILE_S:g} s to compile: write one smaller or less ambiguous"
            ) from None

    def _compile(self, guide: Guide) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits
        from llguidance.numpy import fill_next_token_bitmask

        limits = LLParserLimits(step_max_items=_MAX_ITEMS, max_lexer_states=_MAX_STATES, verbose_errors=False)
        matcher = LLMatcher(self.tokenizer, _grammar_of(guide), log_level=0, limits=limits)
        bits = np.zeros((1, self.mask_words), np.int32)
        began = thread_time()
        if not matcher.is_error():
            fill_next_token_bitmask(matcher, bits)
        if matcher.is_error():
            raise _refusal(guide, _explain(guide, matcher))
        if thread_time() - began > MASK_S:
            raise _refusal(guide, TOO_SLOW)
        if not (bits[0] & self.text_bits).any():
            found = "nothing but an empty output" if matcher.is_accepting() else "no text that the model has tokens for"
            raise _refusal(guide, f"it allows {found}: write one that allows more")
        return matcher

    @cached_property
    def tokenizer(self) -> LLTokenizer:
        """The model's tokens as llguidance knows them. It takes up to a second for a large vocabulary."""
        model = self._model
        if model.weights == "null":
            raise RequestError("builtin:null chooses no tokens, so nothing can guide it: choose another model")
        tokenizer = self._load_tokenizer()
        if isinstance(tokenizer, NullTokenizer):
            return _byte_tokens(model)
        return _checkpoint_tokens(tokenizer.to_json(), tokenizer.vocab_size, model)

    @cached_property
    def mask_words(self) -> int:
        """int32 words of a mask: a bit for each id of the model, and those that only the tokenizer has."""
        return -(-self.tokenizer.vocab_size // 32)

    @cached_property
    def eos_bits(self) -> NDArray[np.int32]:
        """The mask [W] of the model's end-of-sequence tokens."""
        return self._to_bits({*self.tokenizer.eos_tokens} & {*self._model.generation.eos_token_ids})

    @cached_property
    def text_bits(self) -> NDArray[np.int32]:
        """The mask [W] of all other tokens of the model."""
        return self._to_bits({*range(self._model.vocab_size)} - {*self.tokenizer.eos_tokens})

    def _to_bits(self, tokens: Iterable[int]) -> NDArray[np.int32]:
        bits = np.zeros(self.mask_words * 32, bool)
        bits[[*tokens]] = True
        return np.packbits(bits, bitorder="little").view(np.int32)


def describe_error(matcher: LLMatcher) -> str:
    """What is wrong with a matcher that is in error, without what llguidance shows of the source and of its own state.

    Places in a Lark grammar are told as `line 1, column 8`.
    """
    lines = [line for line in _OWN_STATE.split(matcher.get_error())[0].splitlines() if line[:1].strip()]
    return re.sub(r"^(at )?(\d+)\((\d+)\)", r"line \2, column \3", " ".join(lines))


def _refusal(guide: Guide, why: str) -> RequestError:
    return RequestError(f"{_NAMES[guide.kind]}: {why}", _NAMES[guide.kind])


def _check_size(guide: Guide) -> None:
    """Refuse what llguidance would not end with, or would end the process with."""
    if len(guide.source) > _MAX_SOURCE:
        found = f"found {len(guide.source)} characters, write at most {_MAX_SOURCE}"
        raise _refusal(guide, f"it is too large: {found}")
    if guide.kind is GuideKind.REGEX:
        return
    plain = _ASCII_ESCAPE.sub(lambda match: chr(int(match[1], 16)), guide.source)
    if _common_multiple(_MULTIPLE_OF.findall(plain)) > _MAX_MULTIPLE:
        raise _refusal(
            guide,
            "multipleOf is too large, or there are too many: write numbers with a common "
            f"multiple of at most {_MAX_MULTIPLE}, counted in the last decimal place of any",
        )


def _common_multiple(numbers: list[tuple[str, str, str]]) -> float:
    """Of decimal numbers as (whole, fraction, power of ten), in units of the last place of any."""
    found = []
    for whole, fraction, power in numbers:
        digits = (whole + fraction).lstrip("0")
        short = digits.rstrip("0")
        if len(short) > 9 or len(power) > 4:
            return math.inf
        if short:
            found.append((int(short), int(power or 0) - len(fraction) + len(digits) - len(short)))
    places = [0, *(place for _, place in found)]
    if max(places) > 9 or (found and max(places) - min(places) > 9 and len(found) > 1):
        return math.inf
    last = min(places)
    return math.lcm(*(number * 10 ** (place - last) for number, place in found))


def run_apart(compute: Callable[[], T]) -> Future[T]:
    """Begin to compute on a thread of its own, deep enough for llguidance, and which no end of the process waits for.

    What llguidance panics at becomes a RequestError.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(compute())
        except Exception as error:
            done.set_exception(error)
        except BaseException as panic:  # of llguidance, which no `except Exception` would stop
            done.set_exception(RequestError(f"llguidance cannot compute with this grammar: {panic}"))

    thread = threading.Thread(target=run, name="sagellm-grammar", daemon=True)
    with _STACK_LOCK:
        usual = threading.stack_size(_STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(usual)
    return done


_STACK_LOCK = Lock()  # the size is the process's


def _explain(guide: Guide, matcher: LLMatcher) -> str:
    error = describe_error(matcher)
    if guide.kind is GuideKind.REGEX:  # it was made a Lark grammar, in which the place means nothing to its author
        return error.partition(": ")[2].replace(" (in regex)", "")
    return error


def _grammar_of(guide: Guide) -> str:
    from llguidance import LLMatcher

    if guide.kind is GuideKind.REGEX:
        return LLMatcher.grammar_from_regex(guide.source)
    if guide.kind in (GuideKind.GRAMMAR, GuideKind.TOOL_CALL):
        return LLMatcher.grammar_from_lark(guide.source)
    schema = _schema_of(guide)
    try:
        if "x-guidance" in schema:  # llguidance's own options, whitespace among them
            return LLMatcher.grammar_from_json_schema(schema)
        return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": _WHITESPACE})
    except ValueError as error:
        raise _refusal(guide, str(error)) from error


def json_rule(guide: Guide) -> str:
    """What stands in a Lark grammar for the JSON that a guide asks for."""
    return f"%json {json.dumps({'x-guidance': {'whitespace_pattern': _WHITESPACE}} | _schema_of(guide))}"


def _schema_of(guide: Guide) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    return json.loads(guide.source) if guide.kind is GuideKind.JSON_SCHEMA else schema


def _checkpoint_tokens(source: str, vocab_size: int, model: ResolvedModel) -> LLTokenizer:
    """Ids that only the model has are padding, which no grammar allows."""
    from llguidance import LLTokenizer

    eos = [token for token in model.generation.eos_token_ids if token < vocab_size]
    if not eos:  # llguidance wants one: give it one that the model does not have
        data = json.loads(source)
        data["added_tokens"].append(_special_token(vocab_size))
        source, eos = json.dumps(data), [vocab_size]
    try:
        return LLTokenizer(source, n_vocab=max(model.vocab_size, vocab_size, eos[-1] + 1), eos_token=eos)
    except ValueError as error:
        raise RequestError(f"the tokenizer of {model.model_id} cannot be guided: {error}") from error


def _special_token(token: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": "<|the end of what is guided|>", "special": True, **flags}


def _byte_tokens(model: ResolvedModel) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    tokens = _Bytes(model)
    return LLTokenizer(TokenizerWrapper(tokens), eos_token=tokens.eos_token_ids)


class _Bytes:
    """Ids below 256 are bytes; others have no text. In the form that llguidance's TokenizerWrapper takes."""

    bos_token_id = None

    def __init__(self, model: ResolvedModel) -> None:
        size = max(model.vocab_size, 256)  # llguidance wants all bytes; those beyond the model are never allowed
        self.eos_token_ids = [*model.generation.eos_token_ids] or [size]
        self.eos_token_id = self.eos_token_ids[0]
        self.special_token_ids = [*range(256, size)] + [token for token in self.eos_token_ids if token >= size]
        self.tokens = [bytes((token,)) for token in range(256)]
        self.tokens += [f"<{token}>".encode() for token in self.special_token_ids]

    def __call__(self, text: bytes) -> list[int]:
        return [*text]
