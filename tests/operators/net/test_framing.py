"""Framings: any bytes give messages or documented errors, however they are cut, and what is encoded comes back."""

from __future__ import annotations

import json
from itertools import pairwise

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sageLLM.operators.sources.net.framing import FRAMINGS, Frame, JsonLines, LengthPrefixed
from sageLLM.operators.sources.net.messages import Authorization, Cancel, MessageError, read_message
from sageLLM.records import Request

LIMIT = 40

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.integers(0, 9) | st.binary(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
names = st.sampled_from(
    ["prompt", "id", "cancel", "authorization", "messages", "body", "custom_id", "stop", "logit_bias"]
)
maps = st.dictionaries(names | st.text(max_size=4) | st.integers(0, 3), values, max_size=4)


def prefixed(data):
    return len(data).to_bytes(4, "big") + data


streams = st.lists(
    st.binary(max_size=60)
    | values.map(lambda value: prefixed(msgpack.packb(value)))
    | maps.map(lambda value: prefixed(msgpack.packb(value)))
    | maps.map(lambda value: repr(value).replace("'", '"').encode() + b"\n")
    | st.sampled_from([b"\n", b'{"cancel": "a"}\n', b'{"prompt": "hi"}\n', b"\xef\xbb\xbf{}\n"])
    | st.sampled_from([b"\0\0\0\0", b"\xff\xff\xff\xff"]),
    max_size=6,
).map(b"".join)  # fmt: skip


def read_all(framing, chunks):
    frames = [frame for chunk in chunks for frame in framing.receive(chunk)]
    return [*frames, *framing.end()]


def cut(data, places):
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[begin:end] for begin, end in pairwise(ends)]


@pytest.mark.parametrize("kind", [JsonLines, LengthPrefixed])
@settings(deadline=None)
@given(data=streams, places=st.lists(st.integers(0, 400), max_size=8))
def test_any_bytes_give_the_same_messages_however_they_are_cut(kind, data, places):
    whole = read_all(kind(LIMIT), [data])
    assert read_all(kind(LIMIT), cut(data, places)) == whole
    assert read_all(kind(LIMIT), [bytes([byte]) for byte in data]) == whole
    assert all(len(frame.data) <= LIMIT or frame.error for frame in whole)


@pytest.mark.parametrize("kind", [JsonLines, LengthPrefixed])
@settings(deadline=None)
@given(data=streams)
@example(data=prefixed(msgpack.packb({"logit_bias": {1: float("nan")}, "prompt": "x"})))
@example(data=prefixed(msgpack.packb(b"")))
@example(data=prefixed(b"\x81\x90\x01"))  # a list as a key
@example(data=prefixed(b"\x91" * 5000))
@example(data=b"[" * 5000 + b"\n")
def test_every_message_is_understood_or_a_message_error(kind, data):
    for frame in read_all(kind(10_000), [data]):
        try:
            message = read_message(frame, "default")
        except MessageError as error:
            assert str(error)
            assert error.request_id is None or isinstance(error.request_id, str)
        else:
            assert isinstance(message, (Request, Cancel, Authorization))


@pytest.mark.parametrize("name", FRAMINGS)
@settings(deadline=None)
@given(
    events=st.lists(
        st.dictionaries(st.text(max_size=5), st.text(max_size=9) | st.integers(0, 99), min_size=1), max_size=5
    )
)
def test_what_is_encoded_comes_back(name, events):
    framing = FRAMINGS[name](1000)
    data = b"".join(framing.encode(event, framing.writes_msgpack) for event in events)
    frames = read_all(framing, [data])
    decode = msgpack.unpackb if name == "msgpack" else json.loads
    assert [decode(frame.data) for frame in frames] == events


def test_after_a_line_that_is_too_long_the_next_one_is_read():
    frames = read_all(JsonLines(LIMIT), [b"x" * 41, b"y" * 10_000, b'\n{"a": 1}\n'])
    assert [(frame.number, frame.error) for frame in frames] == [
        (1, "the line has 10041 bytes, max_message_bytes is 40"), (2, None),
    ]  # fmt: skip


def test_a_message_that_is_too_long_is_told_before_it_has_come_and_not_kept():
    framing = LengthPrefixed(LIMIT)
    (frame,) = framing.receive((2**32 - 1).to_bytes(4, "big") + b"x" * 100)
    assert frame.error == "the message has 4294967295 bytes, max_message_bytes is 40"
    assert framing.receive(b"x" * 100_000) == []
    assert not framing._buffer


def test_a_stream_that_ends_inside_a_message():
    for data in (b"\0\0", b"\0\0\0\5ab", b"\0\0\1\0abc"):
        framing = LengthPrefixed(LIMIT)
        *_, last = read_all(framing, [data])
        assert (last.number, last.error) == (1, "the stream ended inside a message")


def read(data, **kind):
    return read_message(JsonLines(1000).receive(data + b"\n")[0], "default")


def test_what_a_client_may_say():
    assert read(b'{"cancel": "a"}') == Cancel("a")
    assert read(b'{"cancel": 7}') == Cancel("7")
    assert read(b'{"authorization": "Bearer k"}') == Authorization("Bearer k")
    request = read(b'{"prompt": "say \\"cancel\\""}')
    assert (request.request_id, request.prompt) == ("default", 'say "cancel"')
    assert "Bearer" not in repr(Authorization("Bearer k"))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b'{"cancel": null}', "cancel is no text"),
        (b'{"cancel": "a", "prompt": "x"}', "cancel stands beside other fields"),
        (b'{"authorization": 5}', "authorization is no text"),
        (b'{"authorization": "Bearer sesame", "prompt": "x"}', "authorization stands beside other fields"),
        (b'["cancel"]', "found a JSON array"),
        (b'{"cancel', "not JSON"),
    ],
)
def test_what_is_wrong_is_told_and_shows_no_key(data, told):
    with pytest.raises(MessageError, match=told) as caught:
        read(data)
    assert "sesame" not in str(caught.value)


def test_an_id_that_every_event_would_repeat_is_not_long():
    for fields in ({"prompt": "hi", "id": "x" * 513}, {"prompt": 1, "id": "x" * 513}):
        with pytest.raises(MessageError) as caught:
            read_message(Frame(1, json.dumps(fields).encode(), False), "r")
        assert caught.value.request_id is None
    assert read_message(Frame(1, json.dumps({"prompt": "hi", "id": "x" * 512}).encode(), False), "r").request_id


def test_the_id_of_a_request_that_is_wrong_is_told():
    for data in (b'{"id": "a", "prompt": 5}', b'{"request_id": "a"}', b'{"custom_id": "a", "body": {}}'):
        with pytest.raises(MessageError) as caught:
            read(data)
        assert caught.value.request_id == "a"
