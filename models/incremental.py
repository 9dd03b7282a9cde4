"""Text from a growing list of token ids, piece by piece, never a broken character.

Three ways to turn ids into text exist among checkpoints, and each has a state that knows which text is certain:
byte-level BPE (Llama 3, Qwen, the null model), pieces with byte fallback (Llama 2, Mistral), and anything else.
"""

from __future__ import annotations

import codecs
import re
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .tokenizer import TextTokenizer

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextState(Protocol):
    """The unfinished end of one output."""

    def push(self, ids: Sequence[int]) -> str:
        """Add ids, return the text that nothing to come can change."""
        ...

    def finish(self) -> str:
        """The rest of the text."""
        ...


class IncrementalDecoder:
    """One output stream's decoder.

    All pushes and `finish` together give what `tokenizer.decode` gives for all ids at once. The cost of a push does
    not grow with the length of the output.
    """

    __slots__ = ("finish", "push")

    def __init__(self, tokenizer: TextTokenizer, skip_special_tokens: bool = True) -> None:
        state = tokenizer.new_text_state(skip_special_tokens)
        self.push: Callable[[Sequence[int]], str] = state.push
        self.finish: Callable[[], str] = state.finish


class ByteLevelState:
    """Every id is a run of bytes; text is certain up to the last whole UTF-8 character."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        """See `TextState`."""
        return self._decoder.decode(b"".join(map(self._bytes_of, ids)))

    def finish(self) -> str:
        """See `TextState`."""
        return self._decoder.decode(b"", final=True)


class ByteFallbackState:
    """Ids are pieces of text, or single bytes `<0x..>`.

    A run of byte pieces is one string if it is valid UTF-8 and else one U+FFFD per byte, so it is certain only at its
    end. `strip_left` is how many leading `strip_content` characters the decoder removes from the whole text.
    """

    def __init__(self, piece_of: Callable[[int], str], strip_content: str, strip_left: int) -> None:
        self._piece_of = piece_of
        self._run = bytearray()
        self._strip_content = strip_content
        self._strip_left = strip_left

    def push(self, ids: Sequence[int]) -> str:
        """See `TextState`."""
        parts = []
        for token in ids:
            piece = self._piece_of(token)
            match = BYTE_PIECE.fullmatch(piece)
            if match:
                self._run.append(int(match[1], 16))
            elif piece:
                parts.append(self._end_run() + piece)
        return self._strip("".join(parts))

    def finish(self) -> str:
        """See `TextState`."""
        return self._strip(self._end_run())

    def _end_run(self) -> str:
        if not self._run:
            return ""
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "�" * len(run)

    def _strip(self, text: str) -> str:
        while self._strip_left and text:
            if text[0] != self._strip_content:
                self._strip_left = 0
                break
            text = text[1:]
            self._strip_left -= 1
        return text


class WindowState:
    """Any other decoder: decode a window that starts at the last certain point, twice, and take the difference.

    Exact for decoders whose text of an id depends on its neighbours only.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        """See `TextState`."""
        self._pending += ids
        return self._advance(final=False)

    def finish(self) -> str:
        """See `TextState`."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before = self._decode(self._context)
        after = self._decode(self._context + self._pending)
        if len(after) <= len(before) or (after.endswith("�") and not final):
            return ""
        self._context, self._pending = self._pending, []
        return after[len(before) :]
