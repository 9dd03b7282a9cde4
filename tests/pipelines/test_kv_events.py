"""KV events from decode's port to files and functions, while the run goes on and to its very end."""

from __future__ import annotations

import json

import pytest

import sageLLM.operators  # noqa: F401 - registers the built-in stages
from sageLLM.errors import ConfigError
from sageLLM.graph import build_pipeline, load_pipeline
from sageLLM.graph.drawing import draw_text
from sageLLM.kv_runtime import block_hashes

PROMPTS = [[*range(12), n, n] for n in range(6)]


def with_events(folder, target="cached"):
    """Have answers.yaml write the events to a file."""
    text = (folder / "answers.yaml").read_text().replace("engine:\n", "engine:\n  kv_cache: {block_size: 4}\n")
    text = text.replace("edges:\n", f"edges:\n  - decode.events -> {target}\n")
    if target == "cached":
        text = text.replace("edges:\n", "  cached: {type: jsonl_sink, path: cached.jsonl}\nedges:\n")
    (folder / "answers.yaml").write_text(text)


@pytest.fixture
def watched(files):
    files.write(json.dumps({"prompt_tokens": prompt, "max_new_tokens": 6, "tenant": "t"}) for prompt in PROMPTS)
    return files


def test_events_are_lines_of_a_file_and_tell_all_that_was_committed(watched):
    with_events(watched.folder)
    code, stderr = watched.run()
    assert code == 0, stderr
    events = watched.read("cached.jsonl")
    assert [event["seq"] for event in events] == [*range(len(events))]
    assert {event["kv_event"] for event in events} == {"stored"}
    told = [name for event in events for name in event["block_hashes"]]
    whole = []
    for line in watched.read():
        tokens = PROMPTS[line["src"]["line"] - 1] + line["output_tokens"][:-1]  # the last one's KV is never computed
        whole += block_hashes(tokens, 4, "t")
    assert len(told) == len(set(told))
    assert set(told) == set(whole)
    first = events[0]
    assert first["tenant"] == "t"
    assert (first["parent_hash"], first["start"], first["block_size"], first["tier"]) == (None, 0, 4, "hbm")
    assert first["tokens"] == PROMPTS[0][: len(first["tokens"])]


def test_a_file_with_events_and_dead_letters_is_resumed_and_grows(watched):
    with_events(watched.folder, target="dead")
    assert watched.run()[0] == 0
    before = watched.read("dead.jsonl")
    lines = watched.read()
    (watched.folder / "out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
    assert watched.run()[0] == 0
    assert watched.lines_in() == [*range(1, 7)]
    after = watched.read("dead.jsonl")
    assert after[: len(before)] == before
    assert after[len(before)]["seq"] == 0  # another run


def test_what_is_evicted_is_told_too(make_run, make_requests, small_engine):
    run = make_run(make_requests(30), small_engine, events=[])()
    assert {event.kind.value for event in run.events} == {"stored", "removed"}


def test_lower_tiers_tell_what_they_get_and_drop(make_run, make_requests, small_engine):
    tiers = {"enable_tiering": True, "ddr_tokens": 128}
    engine = {**small_engine, "kv_cache": {"max_tokens": 96, "block_size": 4, **tiers}}
    run = make_run(make_requests(40), engine, events=[])()
    kept, told = set(), set()
    for event in run.events:
        if event.tier == "ddr":
            told.add(event.kind.value)
            names = set(event.block_hashes)
            assert names.isdisjoint(kept) if event.kind == "moved" else names <= kept
            kept ^= names
    assert told == {"moved", "removed"}
    # what was given up after the last step is copied by the checks that follow the run, when nobody reads any more
    assert kept <= {block.key.digest.hex() for block in run.services.tiers[0]._host.blocks()}


def test_metrics_tell_what_tiers_did(make_run, make_requests):
    kv_cache = {"max_tokens": 64, "block_size": 4, "enable_tiering": True, "ddr_tokens": 256}
    run = make_run(make_requests(40), {"kv_cache": kv_cache})()
    text = run.flow.operators["metrics"].expose()
    stats = run.services.get_stats()["kv_tiers"]
    assert stats["ddr_hit_tokens"] > 0
    assert f'sagellm:kv_tier_hit_tokens_total{{tier="ddr"}} {stats["ddr_hit_tokens"]}' in text
    assert f'sagellm:kv_tier_blocks{{tier="ddr"}} {stats["ddr_blocks"]}' in text
    assert 'sagellm:kv_tier_moved_bytes_total{from="hbm",to="ddr"} 0' in text


def test_a_slow_reader_loses_events_and_holds_up_nobody(make_run, make_requests, small_engine):
    operators = {"decode": {"max_event_blocks": 3}, "watch": {"buffer": 1}}
    run = make_run(make_requests(30), small_engine, operators, events=[], watch_every_s=5)()
    assert len(run.completions) == 30
    lost = [event for event in run.events if event.kind == "lost"]
    assert lost  # a worker that waited for the reader would lose none
    assert sum(event.lost or 1 for event in run.events) == run.events[-1].seq + 1


def test_metrics_tell_how_long_blocks_live(make_run, make_requests, small_engine):
    run = make_run(make_requests(30), small_engine)()
    text = run.flow.operators["metrics"].expose()
    for name in ("lifetime", "idle_before_evict", "reuse_gap"):
        (count,) = [line for line in text.splitlines() if line.startswith(f"sagellm:kv_block_{name}_seconds_count ")]
        assert int(count.split()[1]) > 0
    assert run.services.get_stats()["kv_cache"]["block_lifetime_s"]["count"] > 0


def test_unwired_nobody_listens(make_run, make_requests):
    run = make_run(make_requests(5))()
    assert run.services.kv._tree.listeners == [run.services.kv._tree.watch]


def test_the_drawing_names_the_port_and_a_wrong_target_is_told(tmp_path):
    declared = {
        "engine": {"model": {"model_id": "builtin:null"}},
        "operators": {
            "read": {"type": "stdin_source", "on_error": "drop"},
            **{name: {"on_error": "drop"} for name in ("tokenize", "schedule", "prefill", "decode")},
            "detokenize": {"on_error": "drop"},
            "stored": {"type": "filter", "where": [{"field": "kind", "value": "stored"}], "on_error": "drop"},
            "write": {"type": "stdout_sink"},
        },
        "edges": [
            "read -> tokenize -> schedule -> prefill -> decode -> detokenize -> write",
            "decode.events -> stored -> write",
        ],
    }
    assert "events: kv_event" in draw_text(build_pipeline(declared))
    declared["edges"][1] = "decode.events -> stored -> detokenize"
    with pytest.raises(ConfigError, match=r"stored\.out gives kv_event, but detokenize\.in takes sequence or delta"):
        build_pipeline(declared)


def test_a_bound_for_events_that_nobody_reads_is_refused(files):
    pipeline = files.folder / "answers.yaml"
    load_pipeline(pipeline, ["operators.decode.max_event_blocks=65536"])  # the default asks for nothing
    with pytest.raises(ConfigError, match="max_event_blocks is for what decode.events gives, but that goes nowhere"):
        load_pipeline(pipeline, ["operators.decode.max_event_blocks=9"])
    with_events(files.folder)
    load_pipeline(pipeline, ["operators.decode.max_event_blocks=9"])
