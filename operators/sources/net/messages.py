"""What a client may say on a connection: requests, and two messages about them.

{"authorization": "Bearer ..."}         first, where the source has `keys`
{"prompt": "2+2?", "id": "q1", ...}     a request, as in a file (request_format.py)
{"cancel": "q1"}                        end it; what has ended, or never was, is nothing to cancel
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgpack
from pydantic_core import from_json

from ....errors import RequestError
from ....records import Request
from ..lines import RAW_LIMIT
from ..request_format import parse_request, request_from_fields

if TYPE_CHECKING:
    from .framing import Frame


_MAX_ID = 512  # characters, as each event repeats it


@dataclass(frozen=True, slots=True)
class Authorization:
    """Who is there; the key is not shown."""

    header: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Cancel:
    """End a request of this connection."""

    request_id: str


class MessageError(RequestError):
    """A message that is none of these; `request_id` is the request's that it was to be, if it gave one."""

    def __init__(self, message: str, request_id: str | None = None) -> None:
        super().__init__(message)
        self.request_id = request_id


def read_message(frame: Frame, default_id: str) -> Request | Cancel | Authorization:
    """Decode one message. A request that gives no id is called `default_id`.

    Raises:
        MessageError: it is none; the message says what is wrong.
    """
    if frame.error is not None:
        raise MessageError(frame.error)
    read = _read_msgpack if frame.is_msgpack else _read_json
    message = read(frame.data, default_id)
    if isinstance(message, Request) and len(message.request_id) > _MAX_ID:
        raise MessageError(f"the id has {len(message.request_id)} characters: write {_MAX_ID} at most")
    return message


def _read_json(data: bytes, default_id: str) -> Request | Cancel | Authorization:
    if b'"cancel"' in data or b'"authorization"' in data:
        try:
            control = _read_control(from_json(data))
        except ValueError:
            control = None  # parse_request says what is wrong
        if control is not None:
            return control
    try:
        request = parse_request(data, default_id)
    except RequestError as error:
        try:
            fields = from_json(data)
        except ValueError:
            fields = None
        raise MessageError(str(error), _id_in(fields)) from None
    request.raw = data[:RAW_LIMIT].decode("utf-8", "backslashreplace")
    return request


def _read_msgpack(data: bytes, default_id: str) -> Request | Cancel | Authorization:
    try:
        fields = msgpack.unpackb(data, strict_map_key=False)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        reason = str(error) or type(error).__name__  # a key that is a list cannot be hashed: TypeError
        raise MessageError(f"not MessagePack: {reason}") from None
    if not isinstance(fields, dict):
        raise MessageError(f'found a {type(fields).__name__}: write a map such as {{"prompt": "..."}}')
    control = _read_control(fields)
    if control is not None:
        return control
    try:
        return request_from_fields(fields, default_id)
    except RequestError as error:
        raise MessageError(str(error), _id_in(fields)) from None


def _read_control(fields: Any) -> Cancel | Authorization | None:
    if not isinstance(fields, dict) or fields.keys().isdisjoint(("cancel", "authorization")):
        return None
    if len(fields) > 1:
        name = "cancel" if "cancel" in fields else "authorization"
        raise MessageError(f"{name} stands beside other fields: send it in a message of its own")
    (name, value), *_ = fields.items()
    if name == "cancel" and type(value) in (str, int) and value != "":
        return Cancel(str(value))
    if name == "authorization" and isinstance(value, str):
        return Authorization(value)
    write = '{"cancel": "the request\'s id"}' if name == "cancel" else '{"authorization": "Bearer ..."}'
    raise MessageError(f"{name} is no text: write {write}")


def _id_in(fields: Any) -> str | None:
    if not isinstance(fields, dict):
        return None
    for name in ("request_id", "id", "custom_id"):
        value = fields.get(name)
        if type(value) in (str, int) and value != "":
            return str(value) if len(str(value)) <= _MAX_ID else None
    return None
