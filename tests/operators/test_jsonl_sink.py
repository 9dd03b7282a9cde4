"""jsonl_sink: completions and dead letters as JSON lines; what stands in the file is not computed again."""

from __future__ import annotations

import fcntl
import json
import os
import threading

import anyio
import numpy as np
import pytest

from sageLLM.errors import ConfigError, OutputLockedError
from sageLLM.operators.sinks import interval_sync, jsonl_sink
from sageLLM.operators.sinks.jsonl_sink import JsonlSink, JsonlSinkConfig
from sageLLM.records import (
    Choice,
    DeadLetter,
    FinishReason,
    Pooling,
    Request,
    SamplingParams,
    Sequence,
    SourcePosition,
    TokenDelta,
    TokenLogprobs,
    ToolCall,
)
from sageLLM.runtime.flow.resume import ResumeIndex


@pytest.fixture
def write(drive, tmp_path):
    """Write lists of records with the sink; the file's lines, decoded."""

    def run(*inputs, context=None, **config):
        drive(JsonlSink, {"path": "out.jsonl", **config}, inputs, context)
        return [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()]

    return run


def test_a_completion(write, make_completion):
    (line,) = write([make_completion("q1", "four", (4, 5), line=3)])
    assert line == {
        "request_id": "q1",
        "text": "four",
        "output_tokens": [4, 5],
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        "metrics": {"queue_ms": 1.0, "ttft_ms": 20.0, "tpot_ms": 5.0, "e2e_ms": 25.0, "prefix_hit_tokens": 2},
        "src": {"file": "in.jsonl", "line": 3, "offset": 30, "fingerprint": "f-9"},
    }


def test_a_dead_letter(write):
    letter = DeadLetter("not JSON", "{", SourcePosition("in.jsonl", 2, 9, "f-9"))
    too_long = DeadLetter("prompt too long", request=Request("q7", src=SourcePosition("in.jsonl", 5, 99, "f-9")))
    first, second = write([letter, too_long])
    src = {"file": "in.jsonl", "line": 2, "offset": 9, "fingerprint": "f-9"}
    assert first == {"src": src, "line": 2, "error": "not JSON", "raw": "{"}
    assert (second["line"], second["request_id"]) == (5, "q7")


def test_several_choices_and_logprobs(write, make_completion):
    completion = make_completion(sampling=SamplingParams(n=2, logprobs=1, prompt_logprobs=0))
    completion.choices.append(Choice(1, [6], "five", FinishReason.LENGTH))
    completion.choices[0].logprobs = [TokenLogprobs(4, -0.5, [(4, -0.5)]), TokenLogprobs(5, float("-inf"), [])]
    completion.prompt_logprobs = [None, TokenLogprobs(1, -1.0, [])]
    (line,) = write([completion])
    assert [(c["index"], c["text"], c["finish_reason"]) for c in line["choices"]] == [
        (0, "four", "stop"),
        (1, "five", "length"),
    ]
    assert line["usage"]["completion_tokens"] == 3
    assert line["logprobs"] == [
        {"token": 4, "logprob": -0.5, "top": [[4, -0.5]]},
        {"token": 5, "logprob": None, "top": []},
    ]
    assert line["prompt_logprobs"] == [None, {"token": 1, "logprob": -1.0, "top": []}]
    assert line["src"] is None


def test_tool_calls(write, make_completion):
    calling, answering = (make_completion(tools=[{"type": "function", "function": {"name": "add"}}]) for _ in range(2))
    calling.choices[0].tool_calls = [ToolCall("call_1", "add", '{"a": 1}')]
    first, second = write([calling, answering])
    assert first["tool_calls"] == [
        {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    ]
    assert second["tool_calls"] == []
    assert "tool_calls" not in write([make_completion()])[-1]


def test_embeddings(write, make_completion):
    done, cancelled = (make_completion(text="", tokens=(), pooling=Pooling.MEAN) for _ in range(2))
    done.embedding = np.array([0.5, -0.5], np.float32)
    cancelled.choices[0].finish_reason = FinishReason.CANCELLED
    first, second = write([done, cancelled])
    assert (first["embedding"], first["finish_reason"]) == ([0.5, -0.5], "stop")
    assert first["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
    assert list(first) == ["request_id", "embedding", "finish_reason", "usage", "metrics", "src"]
    assert (second["embedding"], second["finish_reason"]) == (None, "cancelled")


def test_token_deltas_are_ignored(write, make_completion):
    delta = TokenDelta(Sequence(Request("q"), None, SamplingParams()), 0, [1], "x")
    assert write([delta]) == []


def test_one_list_is_one_write(write, make_completion, monkeypatch):
    sizes = []
    real = os.write
    monkeypatch.setattr(jsonl_sink.os, "write", lambda fd, data: sizes.append(len(data)) or real(fd, data))
    records = [make_completion(f"q{i}") for i in range(64)]
    assert len(write(records, records)) == 128
    assert len(sizes) == 2


# Exactly once


def test_what_stands_in_the_file_is_kept_and_published(write, make_completion, make_context):
    write([make_completion(line=2), DeadLetter("bad", "", SourcePosition("in.jsonl", 5, 0, "f-9"))])
    index = ResumeIndex()
    lines = write([make_completion(line=1)], context=make_context(resume=index))
    assert [line["src"]["line"] for line in lines] == [2, 5, 1]
    (entry,) = index
    assert (entry.file, entry.fingerprint, entry.outputs) == ("in.jsonl", "f-9", {"out.jsonl"})
    assert [n for n in range(10) if n in entry.lines] == [2, 5]


def test_the_instance_after_a_failed_one_takes_nothing_of_this_run_for_an_earlier_one(
    make_completion, make_context, tmp_path
):
    context = make_context()

    async def two_instances():
        for _ in range(2):
            sink = JsonlSink(JsonlSinkConfig(path="out.jsonl"), context)
            await sink.open()
            await sink.process([make_completion(line=1)], None)  # two copies of a line may go to one file
            await sink.close()

    anyio.run(two_instances)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("torn", [b'{"request_id":"q9","te', b'{"req', b"{", b"\0\0\0", b'{"src":\0\0'])
def test_a_torn_last_line_is_dropped(torn, write, make_completion, tmp_path):
    write([make_completion(line=1)])
    with open(tmp_path / "out.jsonl", "ab") as file:
        file.write(torn)
    assert [line["src"]["line"] for line in write([make_completion(line=2)])] == [1, 2]


@pytest.mark.parametrize(
    "content", [b"my diary\n", b"my diary", b'{"prompt": "a"}\n', b'{"request_id":"a"}\n', b'{"request_id":\n', b"\n"]
)
def test_a_file_of_somebody_else_is_refused_and_not_touched(content, write, tmp_path):
    (tmp_path / "out.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=r"out\.jsonl:1: this line was not written by jsonl_sink"):
        write([])
    assert (tmp_path / "out.jsonl").read_bytes() == content


def test_an_output_has_one_writer(write, tmp_path, make_completion):
    with open(tmp_path / "out.jsonl", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputLockedError, match=r"out\.jsonl: another sink or another run writes this file"):
            write([])
    assert len(write([make_completion()])) == 1


def test_a_cancelled_request_from_a_file_is_left_for_the_next_run(write, make_completion):
    cancelled = make_completion(line=4)
    cancelled.choices[0].finish_reason = FinishReason.CANCELLED
    letter = DeadLetter("cancelled", request=cancelled.request)
    cancelled.request.cancelled = True
    assert write([cancelled, letter]) == []
    cancelled.request.src = None
    assert len(write([cancelled])) == 1


def test_a_failed_write_leaves_no_part_of_its_list(write, make_completion, monkeypatch, tmp_path):
    write([make_completion(line=1)])
    before = (tmp_path / "out.jsonl").read_bytes()
    real = os.write
    room = [100]

    def full(fd, data):
        if not room:
            raise OSError(28, "No space left on device")
        return real(fd, data[: room.pop()])

    monkeypatch.setattr(jsonl_sink.os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        write([make_completion(line=2), make_completion(line=3)])
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_folders_are_made_and_special_files_refused(drive, make_completion, tmp_path):
    drive(JsonlSink, {"path": "a/b/out.jsonl"}, [[make_completion()]])
    assert (tmp_path / "a/b/out.jsonl").stat().st_size > 0
    with pytest.raises(ConfigError, match="stdout_sink"):
        drive(JsonlSink, {"path": "/dev/null"})


# fsync


@pytest.fixture
def synced(monkeypatch, tmp_path):
    """The sizes of out.jsonl at each fsync of it."""

    class Sizes(list):
        happened = threading.Event()

    sizes = Sizes()

    def fsync(fd):
        if os.readlink(f"/proc/self/fd/{fd}").endswith("out.jsonl"):
            sizes.append(os.fstat(fd).st_size)
            sizes.happened.set()

    monkeypatch.setattr(jsonl_sink.os, "fsync", fsync)
    return sizes


def test_fsync_never(write, make_completion, synced):
    write([make_completion()], [make_completion()], fsync="never")
    assert synced == []


def test_fsync_always_is_after_every_list(write, make_completion, synced):
    one, two = write([make_completion()], [make_completion()], fsync="always")
    assert len(set(synced)) == 2
    assert one == two


def test_fsync_interval_happens_while_nothing_more_is_written_and_at_the_end(
    make_completion, make_context, synced, tmp_path, monkeypatch
):
    monkeypatch.setattr(interval_sync, "INTERVAL_S", 0.01)

    async def main():
        sink = JsonlSink(JsonlSink.config_model(path="out.jsonl", fsync="interval"), make_context())
        await sink.open()
        await sink.process([make_completion()], None)
        await anyio.to_thread.run_sync(synced.happened.wait)
        monkeypatch.setattr(interval_sync, "INTERVAL_S", 3600)
        for _ in range(3):
            await sink.process([make_completion()], None)
        await sink.close()

    anyio.run(main)
    assert synced[-1] == (tmp_path / "out.jsonl").stat().st_size
    assert len(synced) <= 4, "not at every list"


def test_a_failed_fsync_is_told_at_the_next_write(make_completion, make_context, monkeypatch):
    monkeypatch.setattr(interval_sync, "INTERVAL_S", 0)

    async def main():
        sink = JsonlSink(JsonlSink.config_model(path="out.jsonl", fsync="interval"), make_context())
        await sink.open()

        def fail(fd):
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(interval_sync.os, "fsync", fail)
            with pytest.raises(OSError, match="Input/output error"), anyio.fail_after(30):
                while True:
                    await sink.process([make_completion()], None)
                    await anyio.sleep(0.001)
        await sink.close()

    anyio.run(main)
