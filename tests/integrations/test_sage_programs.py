"""Whole programs: the examples, what docs/sage.md shows, and how a process ends that uses an engine in a SAGE flow."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*arguments, folder=None):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=100, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_rag_example_answers(capsys):
    example = runpy.run_path(str(EXAMPLES / "sage_rag.py"))
    example["main"](["put an item onto a heap", "shuffle the elements of a list"])
    assert capsys.readouterr().out.splitlines() == [
        "put an item onto a heap",
        "    heapq.heappush: Push item onto heap, maintaining the heap invariant.",
        "shuffle the elements of a list",
        "    random.shuffle: Shuffle list x in place, and return None.",
    ]


def test_the_throughput_example_measures_each_way():
    sizes = ("--requests", "16", "--tokens", "4", "--runs", "1")
    table = run(str(EXAMPLES / "sage_throughput.py"), "--model", "builtin:null", *sizes)
    rows = [line for line in table.splitlines() if line.startswith(("stream, ", "autostop, "))]
    assert len(rows) == 4
    assert rows[0].split()[-2:] == ["64", "1.0x"], "a map that waits takes a step for each token of each request"


PROGRAM = """
import atexit
atexit.register(lambda: print("in use:", handle._engine is not None))  # runs after what is registered later

from sageLLM.integrations.sage import SubmitRequests
from sageLLM.integrations.sage.engines import find_handle

config = {"model": {"model_id": "builtin:null", "max_seq_len": 10**6}, "scheduler": {"max_batch_size": 1}}
submit = SubmitRequests(config=config, options={"max_tokens": 50_000})
for n in range(1000):
    submit.execute(f"question {n}")
handle = find_handle(config)
print("in use:", handle._engine is not None)
"""


def test_the_end_of_the_process_ends_the_engine_whatever_it_is_computing():
    """Nobody closes a map or a stream's sink; fifty million tokens are not waited for."""
    assert run("-c", PROGRAM).splitlines() == ["in use: True", "in use: False"]


DOCUMENT = (EXAMPLES.parent / "docs/sage.md").read_text(encoding="utf-8")
FIRST, STREAM, FUNCTIONS = re.findall(r"^```python\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)


def test_the_documents_flow_runs(capsys):
    exec(FIRST, {})
    assert "text=Push item onto heap, maintaining the heap invariant." in capsys.readouterr().out


def test_the_documents_stream_runs(capsys):
    exec(STREAM, {"__name__": "stream"})
    answers = capsys.readouterr().out
    assert "What does heapq.heappush do?" in answers
    assert "What does heapq.heappop do?" in answers


def test_the_documents_function_fits_where_it_says(tmp_path):
    (tmp_path / "my_functions.py").write_text(FUNCTIONS)
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "max_tokens": 3}\n')
    operator = re.search(r"`(shout: \{type: sage_map.*?\})`", DOCUMENT)[1]
    stages = "tokenize -> schedule -> prefill -> decode -> detokenize"
    (tmp_path / "p.yaml").write_text(
        "engine: {model: {model_id: 'builtin:null'}}\noperators:\n"
        + "".join(f"  {stage}: {{}}\n" for stage in stages.split(" -> "))
        + f"  read: {{type: jsonl_source, path: in.jsonl}}\n  {operator}\n"
        + "  write: {type: jsonl_sink, path: out.jsonl}\n"
        + f"edges: [read -> {stages} -> shout -> write, '*.error -> write']\n"
    )
    command = "from sageLLM.cli.main import main; main()"
    run("-c", command, "run", "p.yaml", "-q", "--allow-module", "my_functions", folder=tmp_path)
    assert '"text":"BCD!!!"' in (tmp_path / "out.jsonl").read_text()
