"""WebSocket messages (RFC 6455) without any I/O, for both sides: text is JSON, binary is MessagePack."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from websockets.client import ClientProtocol
from websockets.frames import Frame as Piece
from websockets.frames import Opcode
from websockets.http11 import Request, Response
from websockets.protocol import State
from websockets.server import ServerProtocol

from .framing import Frame, Framing, encode_line, encode_msgpack

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from websockets.protocol import Protocol
    from websockets.uri import WebSocketURI

_GOING_AWAY = 1001
_LONGEST_REASON = 100  # bytes, of the 123 that a Close frame has room for

_quiet = logging.getLogger("sageLLM.websocket")
_quiet.setLevel(logging.WARNING)  # below that the library logs headers, keys and all


class WebSocket(Framing):
    """Messages of an open WebSocket."""

    may_half_close = False
    pings = True

    def __init__(self, protocol: Protocol) -> None:
        self._protocol = protocol
        self._number = 0
        self._begun = bytearray()  # of a message in pieces, which may be as many and as small as its sender likes
        self._is_binary = False
        self._is_rejected = False

    @property
    def is_ready(self) -> bool:
        return self._protocol.state is not State.CONNECTING

    @property
    def is_closed(self) -> bool:
        return self._is_rejected or self.has_said_goodbye or self._protocol.parser_exc is not None

    @property
    def has_said_goodbye(self) -> bool:
        return self._protocol.close_rcvd is not None

    @property
    def writes_msgpack(self) -> bool:
        return self._is_binary

    def receive(self, data: bytes) -> list[Frame]:
        frames: list[Frame] = []
        while data and not self.is_closed:
            # The handshake line by line: what comes behind it must not be looked at before it has been answered.
            cut = 0 if self.is_ready else data.find(b"\n") + 1
            self._protocol.receive_data(data[:cut] if cut else data)
            data = data[cut:] if cut else b""
            for event in self._protocol.events_received():
                if isinstance(event, Piece):
                    frames += self._join(event)
                elif isinstance(event, (Request, Response)):
                    self._shake_hands(event)
        return frames

    def _join(self, piece: Piece) -> list[Frame]:
        if piece.opcode not in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            return []
        if piece.opcode is not Opcode.CONT:
            self._is_binary = piece.opcode is Opcode.BINARY
        self._begun += piece.data
        if not piece.fin:
            return []
        data, self._begun = bytes(self._begun), bytearray()
        self._number += 1
        return [Frame(self._number, data, self._is_binary)] if data.strip() else []

    def _shake_hands(self, handshake: Request | Response) -> None:
        raise NotImplementedError

    def end(self) -> list[Frame]:
        return []

    def encode(self, fields: dict[str, Any], as_msgpack: bool) -> bytes:
        if self._protocol.state is not State.OPEN:
            return b""
        if as_msgpack:
            self._protocol.send_binary(encode_msgpack(fields))
        else:
            self._protocol.send_text(encode_line(fields)[:-1])
        return self.data_to_send()

    def data_to_send(self) -> bytes:
        return b"".join(self._protocol.data_to_send())

    def goodbye(self, reason: str) -> bytes:
        if self._protocol.state is State.OPEN:
            self._protocol.send_close(_GOING_AWAY, reason.encode()[:_LONGEST_REASON].decode(errors="ignore"))
        return self.data_to_send()

    def ping(self) -> bytes:
        if self._protocol.state is State.OPEN:
            self._protocol.send_ping(b"keepalive")
        return self.data_to_send()


class WebSocketServer(WebSocket):
    """The side that listens. `authenticate` is given the header Authorization, or None."""

    _protocol: ServerProtocol

    def __init__(
        self, max_message_bytes: int, origins: Sequence[str], authenticate: Callable[[str | None], bool]
    ) -> None:
        allowed: list[Any] = [None, *origins]
        super().__init__(ServerProtocol(origins=allowed, max_size=max_message_bytes, logger=_quiet))
        self._authenticate = authenticate

    @property
    def is_closed(self) -> bool:
        return super().is_closed or self._protocol.handshake_exc is not None

    def _shake_hands(self, handshake: Request | Response) -> None:
        assert isinstance(handshake, Request)
        given = handshake.headers.get_all("Authorization")
        if self._authenticate(given[0] if len(given) == 1 else None):
            self._answer(self._protocol.accept(handshake))
            return
        response = self._protocol.reject(401, "a key is needed: send the header `Authorization: Bearer ...`\n")
        response.headers["WWW-Authenticate"] = "Bearer"
        self._answer(response)

    def _answer(self, response: Response) -> None:
        self._is_rejected = response.status_code != 101
        self._protocol.send_response(response)

    def refuse(self, fields: dict[str, Any]) -> bytes:
        self._answer(self._protocol.reject(503, f"{fields['error']}\n"))
        return self.data_to_send()


class WebSocketClient(WebSocket):
    """The side that connects: `data_to_send` begins with its handshake."""

    _protocol: ClientProtocol

    def __init__(self, max_message_bytes: int, uri: WebSocketURI, authorization: str | None) -> None:
        super().__init__(ClientProtocol(uri, max_size=max_message_bytes, logger=_quiet))
        request = self._protocol.connect()
        if authorization is not None:
            request.headers["Authorization"] = authorization
        self._protocol.send_request(request)
        self.rejection: str | None = None

    @property
    def is_closed(self) -> bool:
        return super().is_closed or self._protocol.handshake_exc is not None

    def _shake_hands(self, handshake: Request | Response) -> None:
        assert isinstance(handshake, Response)
        if self._protocol.handshake_exc is not None:
            self._is_rejected = True
            body = bytes(handshake.body or b"").decode(errors="replace").strip()
            self.rejection = f"{handshake.status_code} {handshake.reason_phrase}: {body}"
