"""Every way in which a pipeline can be wrong, each with its position and the advice."""

# ruff: noqa: E501  (one case a line)

from __future__ import annotations

import random
import re
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sageLLM.errors import PipelineError
from sageLLM.graph import build_pipeline, load_pipeline

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def problems(tmp_path: Path, good: str) -> Any:
    """The problems of the good pipeline after some replacements, with the path cut to `p.yaml`."""

    def _problems(*replacements: tuple[str, str], overrides: tuple[str, ...] = (), text: str = good) -> list[str]:
        for old, new in replacements:
            assert old in text, old
            text = text.replace(old, new)
        path = tmp_path / "p.yaml"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(PipelineError) as caught:
            load_pipeline(path, overrides)
        assert caught.value.exit_code == 78
        return [line.removeprefix(f"{tmp_path}/") for line in caught.value.problems]

    return _problems


CASES = {
    "unknown section": (("name: good", "nmae: good"), r"p.yaml:1:1: unknown section 'nmae'; did you mean 'name'\?"),
    "unknown operator": (("type: write", "type: wirte"), r"p.yaml:16:11: no operator type 'wirte'; did you mean 'write'\?"),
    "misspelt operator": (("  prefill: {}", "  prefil: {}"), r"p.yaml:9:3: no operator type 'prefil'; did you mean 'prefill'\?"),
    "dotted path": (("type: write", "type: os.system"), r"p.yaml:16:11: found 'os.system' as a type: a pipeline cannot import code; .*--allow-module os"),
    "unknown field": (("max_batch:", "max_bach:"), r"p.yaml:11:5: operator 'decode' has no field 'max_bach'; did you mean 'max_batch'\?"),
    "mistyped field": (("max_batch: ${batch}", "max_batch: many"), r"p.yaml:11:16: operator 'decode', field 'max_batch': found 'many', input should be a valid integer.*write `max_batch: <integer > 0>`"),
    "out of range": (("max_batch: ${batch}", "max_batch: 0"), r"p.yaml:11:16: .* found 0, input should be greater than 0"),
    "missing field": (("    path: answers.jsonl\n", ""), r"p.yaml:13:3: operator 'write' lacks the field 'path'; write `path: <string>`"),
    "literal": (("  prefill: {}", "  prefill: {on_error: dorp}"), r"p.yaml:9:23: .*found 'dorp', input should be 'route', 'drop' or 'fail'"),
    "nested field": (("  prefill: {}", "  prefill: {restart: {windw_s: 3}}"), r"p.yaml:9:23: .*no field 'restart.windw_s'; did you mean 'window_s'\?"),
    "fields not a mapping": (("  prefill: {}", "  prefill: 3"), r"p.yaml:9:12: operator 'prefill': found 3; write a mapping"),
    "bad node name": (("  prefill: {}", "  pre fill: {}"), r"p.yaml:9:3: operator name 'pre fill'"),
    "engine field": (("vars:", "engine: {model: {dtype: floot}}\nvars:"), r"p.yaml:2:25: engine, field 'model.dtype': found 'floot', .*float32"),
    "engine section": (("vars:", "engine: {modle: {}}\nvars:"), r"p.yaml:2:10: engine has no field 'modle'; did you mean 'model'\?"),
    "engine not available": (("vars:", "engine: {model: {quantization: int8}}\nvars:"), r"p.yaml:2:18: model.quantization is not available yet"),
    "error ratio": (("name: good", "name: good\nmax_error_ratio: 1.5"), r"p.yaml:2:18: found 1.5; write a number from 0 to 1"),
    "unresolved": (("${input}", "${inptu}"), r"p.yaml:7:11: \$\{inptu\} is neither a var nor set in the environment; did you mean \$\{input\}\?"),
    "unresolved inside": (("path: answers.jsonl", "path: a/${NO_SUCH_VARIABLE}.jsonl"), r"p.yaml:14:13: \$\{NO_SUCH_VARIABLE\} is neither .*\$\{NO_SUCH_VARIABLE:default\}"),
    "bad reference": (("${input}", "${in-put}"), r"p.yaml:7:11: found '\$\{in-put\}'; write \$\{name\}"),
    "vars in a circle": (("batch: 8", "batch: ${batch2}\n  batch2: ${batch}"), r"p.yaml:4:10: vars refer to each other in a circle, batch -> batch2 -> batch"),
    "dangling edge": (("detokenize -> write", "detokenise -> write"), r"p.yaml:19:46: no operator 'detokenise' under operators; did you mean 'detokenize'\?"),
    "unlisted operator": (("  - decode.error -> dead", "  - decode.error -> filter"), r"p.yaml:22:21: no operator 'filter' under operators; add `filter:` there"),
    "unknown output port": (("tokenize.error", "tokenize.eror"), r"p.yaml:21:5: 'tokenize' has no output port 'eror'; did you mean 'error'\?"),
    "unknown input port": (("read.error -> dead", "read.error -> dead.inn"), r"p.yaml:20:19: 'dead' \(write\) has no input port 'inn'; did you mean 'in'\?"),
    "source with an input": (("read.error -> dead", "tokenize -> read"), r"p.yaml:20:17: 'read' is a source and takes no input"),
    "sink with an output": (("detokenize -> write\n", "detokenize -> write -> dead\n"), r"p.yaml:19:60: 'write' is a sink and gives nothing"),
    "no arrow": (("  - read.error -> dead", "  - read.error > dead"), r"p.yaml:20:5: found 'read.error > dead'; write a chain with arrows"),
    "empty end": (("read.error -> dead", "read.error -> "), r"p.yaml:20:\d+: found '' between arrows"),
    "edge given twice": (("read.error -> dead", "read -> tokenize"), r"p.yaml:20:5: the edge read.out -> tokenize.in is given twice"),
    "not connected": (("edges:", "  filter:\nedges:"), r"p.yaml:18:3: operator 'filter' is not connected; write `... -> filter -> ...`"),
    "unwired output": (("edges:", "  filter:\nedges:\n  - read -> filter"), r"p.yaml:18:3: what filter.out gives goes nowhere; write `filter.out -> ...`"),
    "unwired input": (("edges:", "  more: {type: write, path: z}\n  merge:\nedges:\n  - read.error -> merge.left -> more"), r"p.yaml:19:3: nothing enters merge.right; write `... -> merge.right`"),
    "unwired error port": (("  - decode.error -> dead\n", ""), r"p.yaml:10:3: the error port of 'decode' is not wired; write `decode.error -> <a sink>` under edges, or `on_error: drop`"),
    "cycle": (("- read.error", "- prefill -> prefill\n  - read.error"), r"p.yaml:20:16: cycle prefill -> prefill; a pipeline is a DAG"),
    "kind mismatch": (("decode -> detokenize -> write", "decode -> write"), r"p.yaml:19:46: decode.out gives sequence or delta, but write.in takes completion or dead_letter; put 'detokenize' between them"),
    "missing stage": (("tokenize -> prefill -> decode", "tokenize -> decode"), r"p.yaml:10:3: 'decode' needs records that are 'prefilled', but those from 'tokenize' are not: a stage is missing; put 'prefill' upstream"),
    "late stage": (("edges:\n  - read -> tokenize -> prefill ->", "  look:\nedges:\n  - read -> tokenize -> prefill -> look ->"), r"p.yaml:18:3: 'look' comes too late: its records are 'prefilled' already, by 'prefill'; put it upstream of 'prefill'"),
    "second single stage": (("edges:\n  - read -> tokenize ->", "  more: {type: prefill}\nedges:\n  - read -> tokenize -> more ->"), r"p.yaml:18:3: 'more' is a second 'prefill' beside 'prefill'; a pipeline has one worker"),
    "nobody answers": (("edges:", "  serve:\n  write_back:\nedges:\n  - serve -> tokenize\n  - decode.error -> write_back"), r"p.yaml:18:3: nobody answers the calls of 'serve': results must reach a 'write_back'; write `reply: \{type: write_back\}`"),
    "copied sequences": (("edges:", "  look:\nedges:\n  - tokenize -> look -> prefill"), r"p.yaml:21:25: tokenize.out gives sequences, which cannot be copied, and goes to 'look' already; leave one edge"),
    "gates without figures": (("vars:", "engine: {benchmark: {enable_gates: true, max_ttft_ms: 9}}\nvars:"), r"p.yaml:2:36: enable_gates needs the figures of a 'metrics' stage; add `metrics:`"),
    "two writers": (("path: dead.jsonl", "path: ./x/../answers.jsonl"), r"p.yaml:17:11: 'dead' writes './x/../answers.jsonl', which 'write' writes too"),
    "input is an output": (("path: dead.jsonl", "path: ./questions.jsonl"), r"p.yaml:17:11: 'dead' writes 'questions.jsonl', which 'read' reads; name another file"),
    "two listeners": (("edges:", "  a: {type: listen, port: 9}\n  b: {type: listen, port: 9}\nedges:\n  - a -> tokenize\n  - b -> tokenize"), r"p.yaml:19:27: 'b' listens on 127.0.0.1:9, where 'a' listens too; give each its own port"),
    "kinds that fit in part": (("edges:\n  - read -> tokenize -> prefill -> decode ->", "  more: {type: prefill}\nedges:\n  - read -> tokenize -> prefill -> decode -> more ->"), r"p.yaml:20:46: decode.out gives sequence or delta, but more.in takes sequence; let more.in take delta too"),
    "duplicate key": (("  prefill: {}", "  prefill: {}\n  prefill: {}"), r"p.yaml:10:3: key 'prefill' is given twice, first at line 9"),
    "key that is no name": (("  prefill: {}", "  yes: {}"), r"p.yaml:9:3: found True as a key"),
    "tag": (("path: answers.jsonl", "path: !!python/name:os.system x"), r"p.yaml:14:11: .*plain values only"),
    "not YAML": (("name: good", "name: [good"), r"p.yaml:\d+:\d+: not YAML"),
    "unquoted wildcard": (("read.error -> dead", "*.error -> dead"), r'p.yaml:20:6: not YAML: .*; a text that begins with \* needs quotes: "\*.error -> dead"'),
    "reference in a flow mapping": (("  prefill: {}", "  prefill: {buffer: ${batch}}"), r'p.yaml:9:\d+: not YAML: .*needs quotes: "\$\{name\}"'),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_problem_is_found_where_it_is(case: str, problems: Any) -> None:
    replacement, expected = CASES[case]
    found = problems(replacement)
    assert [line for line in found if re.match(expected, line)], "\n".join(found)


def test_behind_an_unknown_operator_nothing_is_guessed(problems: Any) -> None:
    assert (
        len(
            problems(
                ("detokenize -> write", "detokenize -> own -> filter -> write"), ("edges:", "  own:\n  filter:\nedges:")
            )
        )
        == 1
    )


@pytest.mark.parametrize("case", ["unknown operator", "misspelt operator", "unknown field", "mistyped field", "unresolved", "unknown output port",
                                  "dangling edge", "cycle", "kind mismatch", "missing stage", "two writers", "two listeners"])  # fmt: skip
def test_one_mistake_is_one_problem(case: str, problems: Any) -> None:
    follow = {"kind mismatch": 2, "missing stage": 2}  # the operator that was left out has no edges
    assert len(problems(CASES[case][0])) == follow.get(case, 1)


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(problems: Any) -> None:
    found = problems(
        ("nam", "nma"),
        ("${input}", "${nowhere}"),
        ("max_batch: ${batch}", "max_bach: 3"),
        ("  - tokenize.error -> dead", "  - tokenize -> nothing"),
        overrides=("inptu=3",),
    )
    assert [line.split(": ")[0] for line in found] == [
        "--set inptu=3",
        *(f"p.yaml:{p}" for p in ("1:1", "7:11", "11:5", "21:17")),
    ]


OVERRIDES = {
    "inptu=3": "--set inptu=3: no var 'inptu' in this pipeline; did you mean 'input'?",
    "operators.decod.max_batch=1": "--set operators.decod.max_batch=1: no operator 'decod' in this pipeline; did you mean 'decode'?",
    "operators.decode.max_batch=x": "--set operators.decode.max_batch=x: operator 'decode', field 'max_batch': found 'x', input",
    "operators.decode.max_bach=1": "--set operators.decode.max_bach=1: operator 'decode' has no field 'max_bach'; did you mean 'max_batch'?",
    "enigne.model.dtype=x": "--set enigne.model.dtype=x: no section 'enigne'; did you mean 'engine'?",
    "input": "--set input: write key=value",
    "input=[": "--set input=[: '[' is not a YAML value; quote it",
    "name.x=3": "--set name.x=3: name is not a mapping, so it has no 'x'",
    "edges.9=a -> b": "--set edges.9=a -> b: edges is a list of 4: write an index from 0",
    "edges.0=read -> nowhere": "--set edges.0=read -> nowhere: no operator 'nowhere'",
}  # fmt: skip


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_wrong_override_names_itself(override: str, problems: Any) -> None:
    found = problems(overrides=(override,))
    assert [line for line in found if line.startswith(OVERRIDES[override])], "\n".join(found)


def test_no_source_and_no_sink(problems: Any) -> None:
    found = problems(text="operators: {filter: {}, tee: {}}\nedges: [filter -> tee.left]\n")
    assert any("no source; add one of: listen, read" in line for line in found)
    assert any("no sink; add one of: write" in line for line in found)


def test_an_empty_file_and_a_list(problems: Any) -> None:
    assert problems(text="")[0].startswith("p.yaml:1:1: found null; write a mapping")
    assert problems(text="- a\n")[0].startswith("p.yaml:1:1: found a list; write a mapping")
    assert [line.split(";")[0] for line in problems(text="name: x\n")] == [
        "p.yaml:1:1: no edges",
        "p.yaml:1:1: no operators",
    ]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"nowhere\.yaml:1:1: cannot be read: No such file"):
        load_pipeline(tmp_path / "nowhere.yaml")


def test_an_alias_inside_its_own_anchor(problems: Any) -> None:
    assert "an alias inside its own anchor" in problems(text="operators: &a\n  x: *a\n")[0]


def test_kinds_travel_through_pass_through_operators(problems: Any) -> None:
    found = problems(
        ("edges:", "  filter:\nedges:"),
        ("tokenize -> prefill -> decode -> detokenize -> write", "tokenize -> filter -> prefill -> decode -> detokenize -> write"),
        ("read.error -> dead", "filter.rejected -> dead\n  - read.error -> dead"),
    )  # fmt: skip
    assert [line.split(": ", 1)[1] for line in found] == [
        "filter.rejected gives sequence, but dead.in takes completion or dead_letter; put 'detokenize' between them"
    ]


def test_a_stage_must_stand_on_every_path(problems: Any) -> None:
    found = problems(
        ("edges:", "  tee:\nedges:"),
        ("tokenize -> prefill -> decode", "tokenize -> tee.left -> prefill -> decode"),
        ("- read.error -> dead", "- tee.right -> decode\n  - read.error -> dead"),
    )
    assert len(found) == 1
    assert "'decode' needs records that are 'prefilled', but those from 'tee' are not" in found[0]


CONTRADICTIONS = {
    "a switch that is off": ("{kv_cache: {max_tokens: 64, hot_threshold: 2}}", "p.yaml:2:37: engine.kv_cache: hot_threshold is for enable_migration: true"),
    "a limit above another": ("{scheduler: {max_batch_size: 4, max_decode_batch: 8}}", "p.yaml:2:41: engine.scheduler: max_decode_batch is 8, but 4 run at once"),
    "a limit below a default": ("{kv_cache: {granularity: token, block_size: 99999}}", "p.yaml:2:41: engine.kv_cache: max_tokens 65536 is less than one block"),
    "between sections": ("{kv_cache: {block_size: 8}, scheduler: {max_batch_size: 4, preemption: swap}}", "p.yaml:2:68: engine: scheduler.preemption swap keeps KV in DDR"),
    "devices": ("{scheduler: {mode: strict}, backend: {threads: 1, device_ids: [0, 1, 2]}}", "p.yaml:2:59: engine: backend.device_ids: found [0, 1, 2], give one, or 2: one for each worker"),
    "one device": ("{backend: {device_ids: [0, 1]}}", "p.yaml:2:20: engine: backend.device_ids: found [0, 1], give one"),
    "a policy": ("{scheduler: {max_overtakes: 3}}", "p.yaml:2:22: engine.scheduler: policy fcfs ignores max_overtakes: leave it out, or write policy: longest_prefix or shortest_job"),
    "no gate": ("{benchmark: {enable_gates: true}}", "p.yaml:2:22: engine.benchmark: enable_gates is true, but there is no gate"),
    "not available": ("{model: {seed: 1, sparsity_ratio: 0.5}}", "p.yaml:2:27: model.sparsity_ratio is not available yet"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_points_at_the_guilty_key(case: str, problems: Any) -> None:
    engine, expected = CONTRADICTIONS[case]
    (found,) = problems(("vars:", f"engine: {engine}\nvars:"))
    assert found.startswith(expected)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("engine.scheduler.max_batch_size=4", "engine.scheduler: max_decode_batch is 8, but 4 run at once"),
        ("engine.scheduler={max_batch_size: 4, max_decode_batch: 6}", "engine.scheduler: max_decode_batch is 6, but 4"),
        ("engine.kv_cache.enable_prefix_caching=false", "engine.kv_cache: eviction is for cached prefixes, but"),
        ("engine.scheduler.mode=strict", "engine: backend.device_ids: found [0, 0, 0], give one, or 2"),
    ],
)
def test_a_contradiction_that_the_command_line_made_names_it(override: str, said: str, problems: Any) -> None:
    engine = "{scheduler: {max_batch_size: 8, max_decode_batch: 8}, kv_cache: {eviction: lfu}"
    engine += ", backend: {device_ids: [0, 0, 0]}}" if "strict" in override else "}"
    found = problems(("vars:", f"engine: {engine}\nvars:"), overrides=(override,))
    assert any(line.startswith(f"--set {override}: {said}") for line in found)


def test_all_contradictions_are_told_at_once(problems: Any) -> None:
    engine = "{scheduler: {decode_steps: 2, max_overtakes: 2}, kv_cache: {ddr_tokens: 64, demote_to: 0.5}}"
    found = problems(("vars:", f"engine: {engine}\nvars:"))
    assert [line.split(": ")[2].split()[0] for line in found] == ["decode_steps", "policy", "ddr_tokens", "demote_to"]


@pytest.mark.parametrize(
    ("settings", "key", "stages"),
    [
        ("enable_tiering: true, ddr_tokens: 4096", "enable_tiering", ["kv_commit", "kv_lookup"]),
        ("eviction: lfu", "eviction", ["kv_commit"]),
        ("ttl_s: 60", "ttl_s", ["kv_commit"]),
        ("max_pinned_ratio: 0.1", "max_pinned_ratio", ["kv_commit"]),
    ],
)
def test_what_is_asked_of_the_prefix_cache_needs_its_stages(
    settings: str, key: str, stages: list[str], problems: Any
) -> None:
    found = problems(("vars:", f"engine: {{kv_cache: {{{settings}}}}}\nvars:"))
    assert sorted(line.split("in the stage ")[1].split(",")[0] for line in found) == stages
    assert all(line.startswith(f"p.yaml:2:21: {key} ") and line.endswith(f"or leave {key} out") for line in found)


def test_tiers_for_swapping_need_no_stage(good: str, tmp_path: Path) -> None:
    engine = "{kv_cache: {enable_tiering: true, ddr_tokens: 4096}, scheduler: {preemption: swap}}"
    (tmp_path / "p.yaml").write_text(f"engine: {engine}\n{good}")
    assert load_pipeline(tmp_path / "p.yaml").engine.kv_cache.enable_tiering


def test_a_setting_for_a_port_that_goes_nowhere_is_a_problem(problems: Any) -> None:
    watching = ("prefill -> decode", "prefill -> watch -> decode")
    (found,) = problems(("edges:", "  watch:\n    max_events: 3\nedges:"), watching)
    assert found.startswith(
        "p.yaml:19:5: max_events is for what watch.events gives, but that goes nowhere; write `watch."
    )


def test_metrics_are_on_or_off_not_both(problems: Any) -> None:
    (found,) = problems(
        ("vars:", "engine: {benchmark: {enable_metrics: false}}\nvars:"),
        ("edges:", "  measure:\nedges:"),
        ("detokenize -> write", "detokenize -> measure -> write"),
    )
    assert found == "p.yaml:2:38: enable_metrics is false, but there is a 'metrics' stage; leave one of them out"


def test_a_failing_plugin_is_a_problem(problems: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    entry = metadata.EntryPoint("mine", "no_such_module:thing", "sagellm.operators")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [entry])
    found = problems(("type: write", "type: mine"))
    assert any("operator plug-in mine = no_such_module:thing cannot be imported" in line for line in found)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 7), seed=st.integers(0, 10**6), density=st.floats(0.05, 0.5))
def test_cycles_are_found_exactly_where_networkx_finds_some(size: int, seed: int, density: float) -> None:
    from sageLLM.graph.checks import Draft, _check_cycles
    from sageLLM.graph.document import Document
    from sageLLM.graph.operator_spec import OperatorSpec
    from sageLLM.graph.pipeline import Edge
    from sageLLM.graph.problems import Problems
    from sageLLM.graph.wiring import End, Wire, Wiring

    chance = random.Random(seed)
    names = [f"n{i}" for i in range(size)]
    pairs = [(a, b) for a in names for b in names if chance.random() < density]
    wires = [Wire(Edge(a, "out", b, "in"), End(a, (), 0), End(b, (), 0)) for a, b in pairs]
    spec = OperatorSpec("x", "", "", None, (), ())  # type: ignore[arg-type]
    problems = Problems(Document("p", {}))
    kept = _check_cycles(Draft(dict.fromkeys(names, spec), {}, {}, Wiring(wires), True), problems)

    graph = networkx.DiGraph(pairs)
    assert bool(len(problems)) == (not networkx.is_directed_acyclic_graph(graph))
    assert networkx.is_directed_acyclic_graph(networkx.DiGraph([(w.edge.source, w.edge.target) for w in kept]))
    for text in problems.error().problems:
        cycle = re.search(r"cycle (.*?);", text)[1].split(" -> ")  # type: ignore[index]
        assert cycle[0] == cycle[-1]
        assert all(graph.has_edge(a, b) for a, b in pairwise(cycle))


def test_build_pipeline_reports_the_same_problems(fake_operators: None) -> None:
    with pytest.raises(PipelineError) as caught:
        build_pipeline({"operators": {"read": {"path": 3}}, "edges": []})
    assert [line.split(": ")[0] for line in caught.value.problems] == [
        "pipeline:edges",
        "pipeline:operators.read.path",
        "pipeline:operators",
    ]
