"""builtin:pydoc-tiny answers, its folder is what it says, and its training script rebuilds all of it from a seed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sageLLM.config import ModelConfig
from sageLLM.models.resolve import resolve_model

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "models" / "builtin" / "pydoc_tiny"
SCRIPT = ROOT / "examples" / "train_pydoc_tiny.py"

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


@pytest.fixture(scope="module")
def script():
    """The training script as a module; what training sets for the whole process is set back."""
    import torch

    spec = importlib.util.spec_from_file_location("train_pydoc_tiny", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # typing.NamedTuple looks its module up
    spec.loader.exec_module(module)
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    yield module
    del sys.modules[spec.name]
    torch.use_deterministic_algorithms(False)
    if workspace is None:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


@pytest.mark.parametrize("question", ANSWERS)
def test_transformers_answers_greedily(question, model, tokenizer):
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=64)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == ANSWERS[question]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_our_decoder_answers_the_same(dtype, load, paged_runner, script):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    runner = paged_runner(load("builtin:pydoc-tiny", dtype=dtype), block_size=16)
    for question, answer in ANSWERS.items():
        expected = tokenizer.encode(answer).ids
        output = runner.generate(script.encode_prompt(tokenizer, question), len(expected) + 1)
        assert tokenizer.decode(output[:-1]) == answer
        assert output[-1] == tokenizer.token_to_id("<|eos|>")


def test_earlier_turns_and_a_system_prompt_do_not_disturb_it(model, tokenizer):
    chat = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What does len do?"},
        {"role": "assistant", "content": "Return the number of items in a container."},
        {"role": "user", "content": [{"type": "text", "text": "And heapq.heappop?"}]},
    ]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=64)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "Pop the smallest item off the heap, maintaining the heap invariant."


def test_the_chat_template_renders_what_was_trained(script, tokenizer):
    from tokenizers import Tokenizer

    question = "What does heapq.heappush do?"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    plain = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    assert rendered == f"<|bos|><|user|>{question}<|assistant|>"
    assert plain.encode(rendered).ids == script.encode_prompt(plain, question)
    assert tokenizer.chat_template == script.CHAT_TEMPLATE


def test_the_folder_is_small_and_reports_how_well_it_was_trained():
    assert resolve_model(ModelConfig(model_id="builtin:pydoc-tiny")).folder == FOLDER
    assert sum(path.stat().st_size for path in FOLDER.glob("*.safetensors")) <= 12_000_000
    assert json.loads((FOLDER / "generation_config.json").read_text())["do_sample"] is False
    report = json.loads((FOLDER / "training_report.json").read_text())
    assert report["share_exact"] >= 0.95
    assert report["held_out_perplexity"] > 1


def test_every_example_question_is_one_line_with_an_id_of_its_own():
    questions = [json.loads(line) for line in (ROOT / "examples" / "questions.jsonl").read_text().splitlines()]
    assert len({question["request_id"] for question in questions}) == len(questions) == 64
    assert all(question["messages"][-1]["role"] == "user" for question in questions)


def test_the_data_does_not_depend_on_the_process(tmp_path, script):
    dumps = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for seed, dump in enumerate(dumps):
        command = [sys.executable, SCRIPT, "--dump-data", dump]
        subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": str(seed)}, check=True, capture_output=True)
    assert dumps[0].read_bytes() == dumps[1].read_bytes()
    items = dict(script.read_items(dumps[0])[1])
    assert len(items) > 4000
    assert items["heapq.heappush"] == ANSWERS["What does heapq.heappush do?"]
    assert "OSError" in items
    assert "IOError" not in items  # an alias
    assert not any("\n" in answer for answer in items.values())


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Sort the list.\n\nMore.", "Sort the list."),
        ("f(x, y=(1, 2)) -> int\n\nReturn the sum, e.g. 3. Or not.", "Return the sum, e.g. 3."),
        ("D.update([E, ]**F) -> None.  Update D from\n dict E.", "Update D from dict E."),
        ("zip(*iterables) --> Yield tuples until one ends.\n\n  >>> zip()", "Yield tuples until one ends."),
        ("date(year, month, day) --> date object", None),
        ("Alias for field number 0", None),
    ],
)
def test_first_sentence(docstring, sentence, script):
    assert script.extract_first_sentence(docstring) == sentence


def test_two_steps_write_the_same_loadable_folder_twice(tmp_path, script):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = ["len", "abs", "heapq.heapify"]  # the last is held out
    data = tmp_path / "items.jsonl"
    script.write_items([script.Item(name, f"What {name} does.") for name in names], data)
    size = ["--steps=2", "--batch-size=4", "--hidden-size=32", "--layers=1", "--vocab-size=300", "--device=cpu"]
    outs = [tmp_path / "first", tmp_path / "second"]
    for out in outs:
        script.main(["--data", str(data), "--out", str(out), *size])
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
    report = json.loads((outs[0] / "training_report.json").read_text())
    assert (report["items_trained"], report["items_held_out"]) == (2, 1)
    loaded = AutoModelForCausalLM.from_pretrained(outs[0])
    assert loaded.config.vocab_size == len(AutoTokenizer.from_pretrained(outs[0]))
