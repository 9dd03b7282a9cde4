"""bench guide: steps of plain and of guided rows, one at a time and two launched at once."""

from __future__ import annotations

import json

import pytest

from sageLLM.benchmarks import guide
from sageLLM.benchmarks.guide import measure_guide
from sageLLM.config import BackendConfig
from sageLLM.runtime.worker import guided_rows


def test_every_case_is_timed_and_guided_rows_go_on_to_the_end(monkeypatch):
    outcomes, consume = [], guided_rows.GuidedRows._consume

    def record(rows, *arguments):
        outcomes.append(consume(rows, *arguments))
        return outcomes[-1]

    monkeypatch.setattr(guided_rows.GuidedRows, "_consume", record)
    times = measure_guide(BackendConfig(backend_type="cpu", threads=1), "tiny", rows=2, steps=3)
    assert set(times) == {(False, 1), (False, 2), (True, 1), (True, 2)}
    assert min(times.values()) > 0
    assert outcomes
    assert not any(outcome.conforming or outcome.failed for outcome in outcomes)


@pytest.mark.parametrize("vocab_size", [300, 5000])
def test_its_tokens_write_json(vocab_size):
    tokenizer = guide._make_tokenizer(vocab_size)
    assert tokenizer.vocab_size == vocab_size
    text = json.dumps({"name": "ü", "age": 7})
    assert tokenizer.decode(tokenizer.encode(text)) == text
