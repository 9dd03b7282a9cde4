"""From file to file by `sagellm run`: kill -9, bad lines, a changed input, the error ratio, many lines."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest


def prompt(number, tokens=4):
    return json.dumps({"prompt": f"line {number}", "max_new_tokens": tokens, "temperature": 0})


def answer(number, tokens):
    length = len(f"line {number}")
    return "".join(chr(97 + (length + k) % 26) for k in range(tokens))


def test_kill_9_loses_nothing_and_computes_nothing_twice(files):
    count, tokens = 700, 600
    files.write(prompt(n, tokens) for n in range(1, count + 1))
    output = files.folder / "out.jsonl"
    with files.start() as process:
        while process.poll() is None and not (output.exists() and output.stat().st_size > 100_000):
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    whole = output.read_bytes().count(b"\n")
    assert 0 < whole < count, "it was not killed in the middle"
    assert files.run()[0] == 0
    assert files.lines_in() == list(range(1, count + 1))
    assert files.computed() == count - whole
    assert all(record["text"] == answer(record["src"]["line"], tokens) for record in files.read())
    assert files.run()[0] == 0
    assert files.computed() == 0


BAD = {
    2: "no JSON",
    4: '{"prompt": "x", "max_new_toksen": 3}',
    5: json.dumps({"prompt": "y" * 5000}),
    7: '{"prompt_tokens": [999999]}',
    8: '{"prompt": "z", "top_p": 4}',
    9: '{"prompt": ""}',
}


def test_bad_lines_become_dead_letters_and_the_stream_goes_on(files):
    files.write(BAD.get(n) or prompt(n) for n in range(1, 11))
    assert files.run("--set", "operators.read.max_line_bytes=4000") == (0, "")
    assert files.lines_in() == [1, 3, 6, 10]
    letters = {letter["src"]["line"]: letter for letter in files.read("dead.jsonl")}
    assert sorted(letters) == sorted(BAD)
    for number, letter in letters.items():
        assert {"src", "line", "error", "raw"} <= set(letter)
        assert letter["line"] == number
        assert letter["raw"]
        assert letter["error"]
    assert "max_new_toksen" in letters[4]["error"]
    assert "999999" in letters[7]["error"]
    # they are finished too: nothing is done again
    assert files.run("--set", "operators.read.max_line_bytes=4000")[0] == 0
    assert (files.computed(), len(files.read("dead.jsonl"))) == (0, len(BAD))


def test_a_changed_input_is_refused(files):
    files.write(prompt(n) for n in range(1, 6))
    assert files.run()[0] == 0
    before = (files.folder / "out.jsonl").read_bytes()
    files.write(prompt(n + 1) for n in range(1, 6))
    code, stderr = files.run()
    assert code == 1
    assert "in.jsonl" in stderr
    assert "changed" in stderr
    assert "Traceback" not in stderr
    assert (files.folder / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize(("ratio", "code"), [("0.6", 0), ("0.4", 1)])
def test_too_many_bad_lines_stop_the_run(files, ratio, code):
    files.write(prompt(n) if n % 2 else "nonsense" for n in range(1, 101))
    ended, stderr = files.run("--set", f"max_error_ratio={ratio}")
    assert ended == code
    assert ("failed, more than max_error_ratio 40.0%" in stderr) == bool(code)
    assert len(files.read("dead.jsonl")) > 0


MEASURE = """
import gc, json, resource, sys
from pathlib import Path
import anyio
import sageLLM.operators
from sageLLM.graph import load_pipeline
from sageLLM.runtime.assembly import assemble
from sageLLM.runtime.services import EngineServices

def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

async def run():
    pipeline = load_pipeline("answers.yaml", ["operators.write.fsync=never", "operators.dead.fsync=never",
                                              "engine.kv_cache.max_tokens=16384",
                                              "engine.scheduler={max_batch_size: 256, max_prefill_batch: 256, "
                                              "max_decode_batch: 256, max_step_tokens: 2048}"])
    services = EngineServices(pipeline.engine)
    async with services.running():
        report = await assemble(pipeline, services).run()
    return report.counters

def write(count):
    with open("in.jsonl", "w") as file:
        for n in range(1, count + 1):
            line = {"prompt_tokens": [n % 256, n // 256 % 256, n // 65536], "max_new_tokens": 1 + n % 2}
            file.write("nonsense\\n" if n % 100 == 0 else json.dumps(line) + "\\n")

write(3000)
anyio.run(run)
for name in ("out.jsonl", "dead.jsonl"):
    Path(name).unlink()
gc.collect()  # the first run's tables
base = peak_mb()
write(10_000)
counters = anyio.run(run)
print(json.dumps([counters, peak_mb() - base]))
"""


def test_10_000_lines_in_bounded_memory(files):
    command = [sys.executable, "-c", MEASURE]
    done = subprocess.run(command, cwd=files.folder, check=True, capture_output=True, text=True)
    counters, growth_mb = json.loads(done.stdout)
    assert (counters["accepted"], counters["done"], counters["error"]) == (10_000, 9_900, 100)
    assert files.lines_in() == [n for n in range(1, 10_001) if n % 100]
    assert len(files.read("dead.jsonl")) == 100
    assert growth_mb < 7, "memory grew with the input"
