"""A pipeline file becomes a Pipeline: vars, environment, overrides, the graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networkx
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sageLLM.config import ModelConfig, SageLLMConfig
from sageLLM.errors import PipelineError
from sageLLM.graph import Pipeline, build_pipeline, load_pipeline
from sageLLM.graph.document import read_document


@pytest.fixture
def load(tmp_path: Path, good: str) -> Any:
    def _load(text: str = good, *overrides: str) -> Pipeline:
        path = tmp_path / "p.yaml"
        path.write_text(text, encoding="utf-8")
        return load_pipeline(path, overrides)

    return _load


def test_a_file_becomes_nodes_and_edges(load: Any, good: str) -> None:
    pipeline = load()
    assert pipeline.name == "good"
    assert list(pipeline.nodes) == ["read", "tokenize", "prefill", "decode", "detokenize", "write", "dead"]
    assert pipeline.nodes["dead"].spec.name == "write"
    assert pipeline.nodes["read"].config.path == "questions.jsonl"
    assert [str(edge) for edge in pipeline.edges_into("dead")] == [
        "read.error -> dead.in",
        "tokenize.error -> dead.in",
        "decode.error -> dead.in",
    ]
    assert pipeline.engine == SageLLMConfig()
    assert pipeline.base_dir == Path.cwd()


def test_the_name_defaults_to_the_file(load: Any, good: str) -> None:
    assert load(good.replace("name: good\n", "")).name == "p"


def test_it_becomes_a_networkx_multidigraph(load: Any) -> None:
    pipeline = load()
    graph = pipeline.to_networkx()
    assert isinstance(graph, networkx.MultiDiGraph)
    assert networkx.is_directed_acyclic_graph(graph)
    assert list(graph) == list(pipeline.nodes)
    assert graph.nodes["dead"]["type"] == "write"
    assert {(e.source, e.target, e.source_port, e.target_port) for e in pipeline.edges} == {
        (s, t, data["source_port"], data["target_port"]) for s, t, data in graph.edges(data=True)
    }


def test_parallel_edges_between_two_nodes_stay_apart(fake_operators: None) -> None:
    pipeline = build_pipeline(
        {
            "operators": {
                "read": {"path": "a", "on_error": "drop"},
                "tee": {},
                "merge": {},
                "tokenize": {"on_error": "drop"},
            }
            | {"prefill": {}, "decode": {"on_error": "fail"}, "detokenize": {}, "write": {"path": "b"}},
            "edges": [
                "read -> tee.left -> merge.left -> tokenize -> prefill -> decode -> detokenize -> write",
                "tee.right -> merge.right",
            ],
        }
    )
    assert pipeline.to_networkx().number_of_edges("tee", "merge") == 2


class TestReferences:
    def test_a_lone_reference_keeps_its_yaml_type(self, load: Any) -> None:
        assert load().nodes["decode"].config.max_batch == 8

    def test_a_var_is_set_from_the_command_line(self, load: Any, good: str) -> None:
        pipeline = load(good, "input=x.jsonl", "batch=3")
        assert pipeline.nodes["read"].config.path == "x.jsonl"
        assert pipeline.nodes["decode"].config.max_batch == 3

    def test_any_key_is_set_from_the_command_line(self, load: Any, good: str) -> None:
        pipeline = load(
            good,
            "operators.decode.max_batch=5",
            "operators.prefill.buffer=2",
            "engine.kv_cache.block_size=32",
            "max_error_ratio=0.25",
            "name=other",
        )
        assert pipeline.nodes["decode"].config.max_batch == 5
        assert pipeline.nodes["prefill"].config.buffer == 2
        assert pipeline.engine.kv_cache.block_size == 32
        assert pipeline.max_error_ratio == 0.25
        assert pipeline.name == "other"

    def test_the_environment_and_its_default(self, load: Any, good: str, monkeypatch: pytest.MonkeyPatch) -> None:
        text = good.replace("${batch}", "${BATCH_SIZE:4}").replace("dead.jsonl", "${DEAD_DIR:out}/dead.jsonl")
        assert load(text).nodes["decode"].config.max_batch == 4
        assert load(text).nodes["dead"].config.path == "out/dead.jsonl"
        monkeypatch.setenv("BATCH_SIZE", "16")
        monkeypatch.setenv("DEAD_DIR", "")
        assert load(text).nodes["decode"].config.max_batch == 16
        assert load(text).nodes["dead"].config.path == "/dead.jsonl"

    def test_a_var_comes_before_the_environment(self, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("input", "from-environment")
        assert load().nodes["read"].config.path == "questions.jsonl"

    def test_vars_may_refer_to_vars_in_any_order(self, load: Any, good: str) -> None:
        text = good.replace("input: questions.jsonl", "input: ${folder}/q.jsonl\n  folder: data")
        assert load(text).nodes["read"].config.path == "data/q.jsonl"
        assert load(text, "folder=/tmp").nodes["read"].config.path == "/tmp/q.jsonl"

    def test_a_doubled_dollar_is_a_plain_one(self, load: Any, good: str) -> None:
        assert load(good.replace("${input}", "$${input}")).nodes["read"].config.path == "${input}"

    def test_dates_stay_text(self, load: Any, good: str) -> None:
        assert load(good.replace("questions.jsonl", "2024-01-01")).nodes["read"].config.path == "2024-01-01"


def test_anchors_and_merge_keys(load: Any, good: str) -> None:
    text = good.replace("  prefill: {}", "  prefill: &small\n    buffer: 7").replace(
        "  detokenize:", "  detokenize:\n    <<: *small\n    on_error: drop"
    )
    assert load(text).nodes["detokenize"].config.buffer == 7


def test_programmatic_pipelines_take_a_config_object(good: str) -> None:
    config = SageLLMConfig(model=ModelConfig(model_id="builtin:null"))
    data = yaml.safe_load(good) | {"engine": config}
    pipeline = build_pipeline(data)
    assert pipeline.engine is config
    assert data["operators"]["tokenize"] is None, "the caller's values are not changed"


def test_programmatic_problems_name_the_key(good: str) -> None:
    data = yaml.safe_load(good)
    data["operators"]["decode"]["max_batch"] = "many"
    with pytest.raises(PipelineError, match=r"^standard:operators\.decode\.max_batch: operator 'decode', field"):
        build_pipeline(data, source="standard")


@pytest.mark.parametrize("defaults", [False, True])
def test_the_echoed_values_load_back_to_an_equal_pipeline(load: Any, good: str, defaults: bool) -> None:
    pipeline = load(good + "max_error_ratio: 0.1\nengine: {kv_cache: {block_size: 8}}\n", "input=other")
    again = load(yaml.safe_dump(pipeline.to_dict(defaults=defaults), sort_keys=False))
    assert {n.name: (n.spec, n.config) for n in again.nodes.values()} == {
        n.name: (n.spec, n.config) for n in pipeline.nodes.values()
    }
    assert (again.edges, again.engine, again.name, again.max_error_ratio) == (
        pipeline.edges,
        pipeline.engine,
        pipeline.name,
        pipeline.max_error_ratio,
    )


_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(st.characters(codec="utf-8"), max_size=8),
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abcxyz", max_size=3), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(_VALUES)
def test_the_document_reads_what_pyyaml_reads(value: Any) -> None:
    text = yaml.safe_dump(value)
    assert read_document(text, "x").data == yaml.safe_load(text)
