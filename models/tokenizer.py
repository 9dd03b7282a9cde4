"""Text to token ids and back, by the `tokenizers` library or, for models without one, by bytes. No torch."""

from __future__ import annotations

import json
import logging
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, RequestError
from .chat_template import ChatTemplate
from .incremental import BYTE_PIECE, ByteFallbackState, ByteLevelState, IncrementalDecoder, TextState, WindowState
from .resolve import NULL_VOCAB_SIZE, read_json
from .tool_calls import ToolFormat, detect_tool_format, to_template_messages

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tokenizers import Tokenizer as RustTokenizer

    from .resolve import ResolvedModel

__all__ = ["IncrementalDecoder", "NullTokenizer", "TextTokenizer", "Tokenizer", "load_tokenizer"]

log = logging.getLogger("sageLLM")


class Tokenizer:
    """A checkpoint's tokenizer.json with its special tokens and chat template."""

    def __init__(
        self,
        rust: RustTokenizer,
        special_tokens: dict[str, str] | None = None,
        chat_template: str | None = None,
        tool_template: str | None = None,
    ) -> None:
        """`tool_template` takes the place of the chat template where there are tools."""
        rust.no_truncation()
        rust.no_padding()
        self._rust = rust
        self._special_tokens = special_tokens or {}
        self._chat_source = chat_template
        self._tool_source = tool_template or chat_template
        self._text_tokens: frozenset[str] = frozenset()  # special ones that are text nevertheless
        self._decoder = _describe_decoder(json.loads(rust.to_str()).get("decoder"))
        self._bytes: dict[tuple[int, bool], bytes] = {}
        self._pieces: dict[tuple[int, bool], str] = {}

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja.

        Raises:
            CheckpointError: tokenizer.json is missing, or a file cannot be read.
        """
        from tokenizers import Tokenizer as RustTokenizer

        path = folder / "tokenizer.json"
        if not path.exists():
            raise CheckpointError(f"{folder}: no tokenizer.json; save the tokenizer in its fast format")
        try:
            rust = RustTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        settings: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / name).exists():
                settings |= read_json(folder / name)
        template_file = folder / "chat_template.jinja"
        template = (
            template_file.read_text(encoding="utf-8")
            if template_file.exists()
            else _named_template(settings.get("chat_template"), "default")
        )
        tool_template = _named_template(settings.get("chat_template"), "tool_use")
        return cls(rust, _special_tokens(settings), template, tool_template)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._rust.get_vocab_size(with_added_tokens=True)

    def to_json(self) -> str:
        """The content of tokenizer.json."""
        text: str = self._rust.to_str()
        return text

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of one text.

        Raises:
            RequestError: the text is not valid Unicode (lone surrogates).
        """
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        """The ids of many texts, in parallel outside the GIL.

        Raises:
            RequestError: a text is not valid Unicode (lone surrogates).
        """
        try:
            encodings = self._rust.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError) as error:
            raise RequestError(f"a prompt is not valid Unicode text: {error}") from error
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of one list of ids; ids outside the vocabulary give nothing."""
        return self.decode_batch([ids], skip_special_tokens)[0]

    def decode_batch(self, lists: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        """The texts of many lists of ids."""
        if skip_special_tokens and self._text_tokens:
            lists = [[token for token in ids if token not in self._special_ids] for ids in lists]
            skip_special_tokens = False
        texts: list[str] = self._rust.decode_batch(lists, skip_special_tokens)
        return texts

    def token_bytes(self, token: int) -> bytes:
        """What one token is in a text, in UTF-8: it may end within a character. Special tokens are their names."""
        kind, replacements, _ = self._decoder
        if kind == "byte_level":
            return self._bytes_of(token, skip_special_tokens=False)
        if kind != "byte_fallback":
            return self.decode([token], skip_special_tokens=False).encode()
        piece = self._piece_of(token, False, replacements)
        match = BYTE_PIECE.fullmatch(piece)
        return bytes((int(match[1], 16),)) if match else piece.encode()

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation, as transformers' `apply_chat_template` renders it. Messages, with the
        calls in them, and tools have OpenAI's form; `variables` are further ones of the template's.

        Raises:
            RequestError: the model has no chat template, or the messages, tools or variables do not fit it.
            CheckpointError: the template itself is wrong.
        """
        template = self._tool_template if tools else self._chat_template
        if template is None:
            raise RequestError("this model has no chat template: send `prompt` instead of `messages`")
        if tools and not template.takes_tools:
            raise RequestError("this model's chat template takes no tools: leave them out", "tools")
        if unread := sorted(variables.keys() - template.names):
            told = f"chat_template_kwargs: this model's chat template does not read {unread[0]!r}: leave it out"
            raise RequestError(told, "chat_template_kwargs")
        if "tool_calls" not in template.source and any(message.get("tool_calls") for message in messages):
            raise RequestError("this model's chat template knows no tool_calls: leave them out of messages", "messages")
        return template.render(to_template_messages(messages), add_generation_prompt, tools=tools or None, **variables)

    @cached_property
    def tool_format(self) -> ToolFormat | None:
        """In which form the model writes its calls, if its chat template tells one that is known."""
        return None if self._tool_source is None else detect_tool_format(self._tool_source)

    @cached_property
    def for_tools(self) -> Tokenizer:
        """The same, for outputs in which calls are looked for: to it their markers are text."""
        twin = Tokenizer(self._rust, self._special_tokens, self._chat_source, self._tool_source)
        twin._text_tokens = frozenset(self.tool_format.markers) if self.tool_format else frozenset()
        return twin

    @cached_property
    def control_ids(self) -> dict[str, int]:
        """The tokens that are no text to llguidance, so that a grammar names them by their ids: special ones, and any
        that was added and looks like `<...>`."""
        added = self._rust.get_added_tokens_decoder()
        return {
            entry.content: token
            for token, entry in added.items()
            if entry.special or (entry.content.startswith("<") and entry.content.endswith(">"))
        }

    def encode_chat(self, messages: list[dict[str, Any]], **variables: Any) -> list[int]:
        """The ids of a rendered conversation; the template writes the special tokens, so none are added.

        Raises:
            RequestError: as `render_chat`.
        """
        return self.encode(self.render_chat(messages, **variables), add_special_tokens=False)

    def new_text_state(self, skip_special_tokens: bool = True) -> TextState:
        """The state behind an `IncrementalDecoder`."""
        kind, replacements, strip = self._decoder
        if kind == "byte_level":
            return ByteLevelState(lambda token: self._bytes_of(token, skip_special_tokens))
        if kind == "byte_fallback":

            def piece_of(token: int) -> str:
                return self._piece_of(token, skip_special_tokens, replacements)

            return ByteFallbackState(piece_of, *strip)
        return WindowState(lambda ids: self.decode(ids, skip_special_tokens))

    def stream(self, skip_special_tokens: bool = True) -> IncrementalDecoder:
        """A decoder for one output that grows."""
        return IncrementalDecoder(self, skip_special_tokens)

    @cached_property
    def _chat_template(self) -> ChatTemplate | None:
        return None if self._chat_source is None else ChatTemplate(self._chat_source, self._special_tokens)

    @cached_property
    def _tool_template(self) -> ChatTemplate | None:
        return None if self._tool_source is None else ChatTemplate(self._tool_source, self._special_tokens)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self._rust.get_added_tokens_decoder()
        return frozenset(
            token for token, entry in added.items() if entry.special and entry.content not in self._text_tokens
        )

    def _token(self, token: int, skip_special_tokens: bool) -> str:
        if skip_special_tokens and token in self._special_ids:
            return ""
        return self._rust.id_to_token(token) or ""

    def _bytes_of(self, token: int, skip_special_tokens: bool) -> bytes:
        key = (token, skip_special_tokens)
        known = self._bytes.get(key)
        if known is None:
            text = self._token(token, skip_special_tokens)
            try:
                known = bytes([_BYTE_OF_CHAR[char] for char in text])
            except KeyError:
                known = text.encode()
            self._bytes[key] = known
        return known

    def _piece_of(self, token: int, skip_special_tokens: bool, replacements: list[tuple[str, str]]) -> str:
        key = (token, skip_special_tokens)
        known = self._pieces.get(key)
        if known is None:
            known = self._token(token, skip_special_tokens)
            for pattern, content in replacements:
                known = known.replace(pattern, content)
            self._pieces[key] = known
        return known


class NullTokenizer:
    """Ids 0..255 are the bytes of UTF-8; 256, 257 and 258 begin, end and pad a sequence and have no text.

    The tokenizer of `builtin:null`, and of models that come without one. Encoding adds no special tokens.
    """

    tool_format: ToolFormat | None = None

    def __init__(self, vocab_size: int = NULL_VOCAB_SIZE) -> None:
        self.vocab_size = vocab_size
        self.for_tools = self

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """See `Tokenizer.encode`."""
        try:
            return list(text.encode())
        except UnicodeEncodeError as error:
            raise RequestError(f"a prompt is not valid Unicode text: {error}") from error

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """See `Tokenizer.decode`."""
        return _bytes_below_256(ids).decode("utf-8", "replace")

    def decode_batch(self, lists: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        """See `Tokenizer.decode_batch`."""
        return [_bytes_below_256(ids).decode("utf-8", "replace") for ids in lists]

    def token_bytes(self, token: int) -> bytes:
        """See `Tokenizer.token_bytes`."""
        return bytes((token,)) if token < 256 else b""

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """One line `role: content` per message.

        Raises:
            RequestError: a message lacks `role` or `content`, or there are tools, calls of them, or variables.
        """
        if variables:
            raise RequestError("this model has no chat template: leave this out", "chat_template_kwargs")
        if tools or any(message.get("tool_calls") for message in messages):
            raise RequestError("this model has no chat template that takes tools: leave them out", "tools")
        try:
            lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        except (KeyError, TypeError) as error:
            raise RequestError(f"a message needs `role` and `content`: {error!r}") from error
        return "".join(lines) + ("assistant: " if add_generation_prompt else "")

    def encode_chat(self, messages: list[dict[str, Any]], **variables: Any) -> list[int]:
        """See `Tokenizer.encode_chat`."""
        return self.encode(self.render_chat(messages, **variables))

    @property
    def control_ids(self) -> dict[str, int]:
        """See `Tokenizer.control_ids`."""
        return {}

    def new_text_state(self, skip_special_tokens: bool = True) -> TextState:
        """See `Tokenizer.new_text_state`."""
        return ByteLevelState(lambda token: bytes((token,)) if token < 256 else b"")

    def stream(self, skip_special_tokens: bool = True) -> IncrementalDecoder:
        """See `Tokenizer.stream`."""
        return IncrementalDecoder(self, skip_special_tokens)


TextTokenizer = Tokenizer | NullTokenizer


def load_tokenizer(resolved: ResolvedModel) -> TextTokenizer:
    """The tokenizer of a resolved model; the byte tokenizer, with a warning, where a random-weight model has none.

    Raises:
        CheckpointError: a model with real weights has no tokenizer.json, or a file cannot be read.
    """
    if resolved.weights == "null":
        return NullTokenizer()
    folder = resolved.folder
    if resolved.weights == "dummy" and (folder is None or not (folder / "tokenizer.json").exists()):
        log.warning("model %r has no tokenizer.json: text is encoded as its UTF-8 bytes", resolved.model_id)
        return NullTokenizer(resolved.vocab_size)
    if folder is None:
        raise CheckpointError(f"{resolved.model_id}: has no folder to read tokenizer.json from")
    return Tokenizer.from_folder(folder)


def _bytes_below_256(ids: Sequence[int]) -> bytes:
    try:
        return bytes(ids)
    except ValueError:
        return bytes([token for token in ids if token < 256])


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the other 68 for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


def _describe_decoder(decoder: dict[str, Any] | None) -> tuple[str, list[tuple[str, str]], tuple[str, int]]:
    """Which text state fits a tokenizer.json's `decoder`: its kind, the replacements in a piece, what is stripped."""
    unknown: tuple[str, list[tuple[str, str]], tuple[str, int]] = ("other", [], ("", 0))
    if decoder is None:
        return unknown
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return "byte_level", [], ("", 0)
    replaces = kinds.count("Replace")
    if kinds[:replaces] != ["Replace"] * replaces:
        return unknown
    if kinds[replaces:] not in (["ByteFallback", "Fuse"], ["ByteFallback", "Fuse", "Strip"]):
        return unknown
    patterns = [(step["pattern"].get("String"), step["content"]) for step in steps[:replaces]]
    last = steps[-1]
    if any(pattern is None for pattern, _ in patterns) or last.get("stop", 0):
        return unknown
    return "byte_fallback", patterns, (last.get("content", ""), last.get("start", 0))


def _named_template(found: str | list[dict[str, str]] | None, name: str) -> str | None:
    """`chat_template` is a string, or a list of named ones: `default`, and `tool_use` for where there are tools."""
    if isinstance(found, list):
        return next((entry["template"] for entry in found if entry["name"] == name), None)
    return found if name == "default" else None


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` and so on, whether written as a string or as an object with `content`."""
    tokens: dict[str, str] = {}
    for key, value in settings.items():
        if not key.endswith("_token"):
            continue
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            tokens[key] = content
    return tokens
