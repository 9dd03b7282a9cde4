"""stdin_source: JSON lines from standard input, as they come."""

from __future__ import annotations

import os

import anyio
import pytest

from sageLLM.operators.sources.stdin_source import StdinSource


@pytest.fixture
def pipe(monkeypatch):
    """A pipe that stands in for standard input; its writing end."""
    reading, writing = os.pipe()
    monkeypatch.setattr(StdinSource, "fd", reading)
    with open(writing, "wb", buffering=0) as file:
        yield file
    os.close(reading)


def test_requests_until_the_end_of_input(pipe, drive):
    pipe.write(b'{"prompt": "a"}\n\n{"id": "b", "prompt": "b"}')
    pipe.close()
    out = drive(StdinSource, {})
    assert [(r.request_id, r.prompt) for r in out.sent] == [("line-1", "a"), ("b", "b")]
    assert (out.sent[1].src.file, out.sent[1].src.line, out.sent[1].src.fingerprint) == ("<stdin>", 3, "")


def test_a_bad_line_is_a_dead_letter_and_the_stream_goes_on(pipe, drive):
    pipe.write(b'nonsense\n{"prompt": "%b"}\n{"prompt": "b"}\n' % (b"x" * 99))
    pipe.close()
    out = drive(StdinSource, {"max_line_bytes": 50})
    assert [r.prompt for r in out.sent] == ["b"]
    assert out.letters[0].error.startswith("not JSON")
    assert "max_line_bytes is 50" in out.letters[1].error


def test_a_line_is_sent_on_before_the_next_one_comes(pipe, make_context, outlet, loop_name):
    async def main():
        arrived = anyio.Event()

        class Watching(outlet):
            async def send(self, records, port="out"):
                await super().send(records)
                arrived.set()

        out = Watching()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(StdinSource(StdinSource.config_model(), make_context()).run, None, out)
            pipe.write(b'{"prompt": "a"}\n{"promp')
            with anyio.fail_after(30):
                await arrived.wait()
            assert [r.prompt for r in out.sent] == ["a"]
            pipe.close()
        assert len(out.letters) == 1

    anyio.run(main, backend=loop_name)


def test_waiting_for_input_can_be_cancelled(pipe, make_context, outlet, loop_name):
    async def main():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(StdinSource(StdinSource.config_model(), make_context()).run, None, outlet())
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()

    anyio.run(main, backend=loop_name)  # returns, although the pipe stays open


@pytest.mark.parametrize("name", ["in.jsonl", "/dev/null"])
def test_a_redirected_file_and_dev_null(name, tmp_path, monkeypatch, drive):
    path = tmp_path / name
    if name != "/dev/null":
        path.write_text('{"prompt": "a"}\n' * 10_000)
    with open(path, "rb") as file:
        monkeypatch.setattr(StdinSource, "fd", file.fileno())
        assert len(drive(StdinSource, {}).sent) == (0 if name == "/dev/null" else 10_000)
