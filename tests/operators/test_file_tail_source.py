"""file_tail_source: requests from a file that grows, is rotated or truncated, as they are appended."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from contextlib import asynccontextmanager

import anyio
import pytest

from sageLLM.errors import ConfigError
from sageLLM.operators.sources import file_tail_source
from sageLLM.operators.sources.file_tail_source import FileTailSource

POLL_S = 0.002


def line(prompt: str) -> bytes:
    return json.dumps({"prompt": prompt}).encode() + b"\n"


@pytest.fixture
def log(tmp_path):
    return tmp_path / "requests.jsonl"


def append(path, *prompts: str) -> None:
    with path.open("ab") as file:
        file.write(b"".join(map(line, prompts)))


class Following:
    """A source that runs; `prompts` is what it has sent."""

    def __init__(self, outlet) -> None:
        self.outlet = outlet

    @property
    def prompts(self) -> list[str]:
        return [request.prompt for request in self.outlet.sent]

    async def until(self, *prompts: str) -> None:
        with anyio.fail_after(20):
            while self.prompts != [*prompts]:  # noqa: ASYNC110 - nobody tells
                await anyio.sleep(POLL_S)

    async def idle(self) -> None:
        """It has looked again and found nothing."""
        await anyio.sleep(20 * POLL_S)


@pytest.fixture
def follow(make_context, outlet, loop_name):
    """`follow(body, path=...)` runs `body(following)` beside a source, with a context that tests may share."""

    @asynccontextmanager
    async def running(context, **config):
        source = FileTailSource(FileTailSource.config_model(poll_interval_s=POLL_S, **config), context)
        await source.open()
        try:
            async with anyio.create_task_group() as tasks:
                following = Following(outlet())
                tasks.start_soon(source.run, None, following.outlet)
                yield following
                tasks.cancel_scope.cancel()
        finally:
            await source.close()

    def run(body, context=None, **config):
        async def main():
            async with running(context or make_context(), path="requests.jsonl", **config) as following:
                await body(following)

        anyio.run(main, backend=loop_name)

    return run


def test_lines_are_sent_as_they_are_appended_once_they_are_whole(log, follow):
    append(log, "a")

    async def body(following):
        await following.until("a")
        with log.open("ab") as file:
            file.write(line("b") + line("c")[:7])
            file.flush()
            await following.until("a", "b")
            await following.idle()
            file.write(line("c")[7:])
        await following.until("a", "b", "c")
        src = following.outlet.sent[2].src
        assert (src.file, src.line, src.offset) == ("requests.jsonl", 3, 2 * len(line("a")))

    follow(body)


def test_the_file_may_come_later(log, follow):
    async def body(following):
        await following.idle()
        append(log, "a")
        await following.until("a")

    follow(body)


def test_a_renamed_file_is_read_to_its_end_before_the_next(log, follow, tmp_path):
    append(log, "a")

    async def body(following):
        await following.until("a")
        log.rename(tmp_path / "requests.jsonl.1")
        append(tmp_path / "requests.jsonl.1", "b")  # whoever writes has not noticed yet
        await following.until("a", "b")
        with (tmp_path / "requests.jsonl.1").open("ab") as old:
            old.write(line("c").rstrip())  # the last line has no newline
        append(log, "d")
        await following.until("a", "b", "c", "d")
        assert [request.src.line for request in following.outlet.sent] == [1, 2, 3, 1]

    follow(body)


@pytest.mark.parametrize("first", ["a", "other"])
def test_a_truncated_file_is_read_from_its_start(log, follow, first):
    append(log, "a", "b")

    async def body(following):
        await following.until("a", "b")
        os.truncate(log, 0)
        await following.idle()
        append(log, first, "c")
        await following.until("a", "b", first, "c")

    follow(body)


def test_a_file_that_was_rewritten_and_is_longer_by_now(log, follow):
    append(log, "a")

    async def body(following):
        await following.until("a")
        log.write_bytes(line("x") + line("y") + line("z"))  # the same inode, and no moment at which it looked shorter
        await following.until("a", "x", "y", "z")

    follow(body)


def test_from_the_end(log, follow):
    append(log, "old")
    with log.open("ab") as file:
        file.write(line("half")[:5])

    async def body(following):
        await following.idle()
        with log.open("ab") as file:
            file.write(line("half")[5:])
        append(log, "new")
        await following.until("half", "new")
        assert [request.src.line for request in following.outlet.sent] == [2, 3]

    follow(body, start_at="end")


def test_bad_lines_are_dead_letters_and_the_stream_goes_on(log, follow):
    log.write_bytes(b"nonsense\n" + line("x" * 100) + b"\n" + line("good"))

    async def body(following):
        await following.until("good")
        errors = [letter.error for letter in following.outlet.letters]
        assert errors[0].startswith("not JSON") and "max_line_bytes is 50" in errors[1]
        assert [letter.line for letter in following.outlet.letters] == [1, 2]

    follow(body, max_line_bytes=50)


def test_a_restarted_source_goes_on_where_the_failed_one_was(log, follow, make_context):
    context = make_context()
    append(log, "a", "b")

    async def first(following):
        await following.until("a", "b")

    async def second(following):
        append(log, "c")
        await following.until("c")

    follow(first, context)
    follow(second, context)


def test_what_is_no_file_is_refused(log, follow):
    log.mkdir()

    async def body(following):
        pytest.fail("it began")

    with pytest.raises(ConfigError, match=r"requests\.jsonl: is not a regular file"):
        follow(body)


PIPELINE = """\
engine: {model: {model_id: "builtin:null"}}
operators:
  source: {type: file_tail_source, path: requests.jsonl, poll_interval_s: 0.005}
  tokenize: {}
  schedule: {}
  prefill: {}
  decode: {}
  detokenize: {}
  sink: {type: jsonl_sink, path: answers.jsonl}
edges:
  - source -> tokenize -> schedule -> prefill -> decode -> detokenize -> sink
  - "*.error -> sink"
"""


def test_with_jsonl_sink_exactly_once_across_kill_9(log, tmp_path):
    """Killed at random moments while lines are appended; the last run is let to finish."""
    (tmp_path / "p.yaml").write_text(PIPELINE)
    answers, seed = tmp_path / "answers.jsonl", random.Random(7)
    written = 0

    def answered() -> list[str]:
        if not answers.exists():
            return []
        return [json.loads(row)["request_id"] for row in answers.read_bytes().splitlines(keepends=True)[:-1] if row]

    for turn in range(4):
        run = [sys.executable, "-c", "from sageLLM.cli.main import main; main()", "run", "p.yaml", "-q"]
        process = subprocess.Popen(run, cwd=tmp_path)
        with log.open("ab") as file:
            for number in range(written, written + 150):
                file.write(json.dumps({"id": f"r{number}", "prompt": "hi", "max_new_tokens": 2}).encode() + b"\n")
        written += 150
        goal = seed.randint(1, 149) + 150 * turn if turn < 3 else written - 1
        while len(answered()) < goal:
            assert process.poll() is None
            time.sleep(0.005)
        if turn < 3:
            process.kill()
        else:
            process.terminate()
        process.wait(30)
    rows = [json.loads(row)["request_id"] for row in answers.read_bytes().splitlines()]
    assert sorted(rows) == sorted(f"r{number}" for number in range(written))


def test_a_file_that_is_cut_off_while_its_end_is_looked_for(tmp_path, monkeypatch):
    path = tmp_path / "requests.jsonl"
    path.write_bytes(b"0123456789")
    monkeypatch.setattr(file_tail_source, "_CHUNK_BYTES", 4)
    fd = os.open(path, os.O_RDONLY)
    file = file_tail_source._Followed(fd, 100)
    monkeypatch.setattr(file.splitter, "feed", lambda chunk: os.truncate(path, 0))
    file.skip_to_end()
    assert file.was_cut_off
    os.close(fd)
