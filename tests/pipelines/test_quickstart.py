"""The built-in model's ten fixed answers, from YAML and from Python: there is one code path."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import sageLLM
from sageLLM import GenerateRequest, SageLLMConfig, SageLLMEngine
from sageLLM.graph.loader import load_pipeline

QUICKSTART = Path(sageLLM.__file__).parent / "pipelines" / "quickstart.yaml"

READY = sorted(QUICKSTART.parent.glob("*.yaml"))

ANSWERS = {
    "What does heapq.heappush do?": "Push item onto heap, maintaining the heap invariant.",
    "What does sorted do?": "Return a new list containing all items from the iterable in ascending order.",
    "What does os.path.join do?": "Join two or more pathname components, inserting '/' as needed.",
    "What does json.dumps do?": "Serialize ``obj`` to a JSON formatted ``str``.",
    "What does str.split do?": "Return a list of the substrings in the string, using sep as the separator string.",
    "What is textwrap.dedent?": "Remove any common leading whitespace from every line in `text`.",
    "Explain functools.lru_cache.": "Least-recently-used cache decorator.",
    "describe random.shuffle": "Shuffle list x in place, and return None.",
    "what does dict.get do": "Return the value for key if key is in the dictionary, else default.",
    "What does `asyncio.gather` do?": "Return a future aggregating results from the given coroutines/futures.",
}


def chat(question):
    return [{"role": "user", "content": question}]


def test_the_quickstart_answers(tmp_path):
    lines = [{"id": question, "messages": chat(question), "temperature": 0} for question in ANSWERS]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = [f"--set={name}={tmp_path / name}.jsonl" for name in ("output", "dead")]
    settings += [f"--set=input={tmp_path / 'in.jsonl'}", "--set=engine.backend.backend_type=cpu"]
    code = "from sageLLM.cli.main import main; main()"
    command = [sys.executable, "-c", code, "run", str(QUICKSTART), *settings]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in (tmp_path / "output.jsonl").read_text().splitlines()]
    assert {result["request_id"]: result["text"] for result in results} == ANSWERS
    assert {result["finish_reason"] for result in results} == {"stop"}
    assert (tmp_path / "dead.jsonl").read_text() == ""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_engine_answers_the_same(dtype):
    config = SageLLMConfig.model_validate({"model": {"dtype": dtype}, "backend": {"backend_type": "cpu", "threads": 1}})
    requests = [GenerateRequest(messages=chat(question), temperature=0, max_new_tokens=64) for question in ANSWERS]
    with SageLLMEngine(config) as engine:
        together = [output.text for output in engine.generate(requests)]
        alone = [engine.generate(request).text for request in requests[:3]]
    assert together == [*ANSWERS.values()]
    assert alone == together[:3]


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_every_ready_pipeline_is_valid_and_named_as_its_file(path):
    assert load_pipeline(path).name == path.stem
