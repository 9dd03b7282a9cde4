"""`sagellm bench`: what it prints and what it refuses. No figure is judged here: a test machine is no benchmark."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from sageLLM.benchmarks import compare as comparing
from sageLLM.benchmarks.measurement import Measurement
from sageLLM.cli.main import cli
from sageLLM.config import KVEviction


@pytest.fixture(autouse=True)
def collector_untouched(monkeypatch):
    monkeypatch.setattr("sageLLM.runtime.garbage.collect_rarely", lambda: None)


def bench(*arguments):
    return CliRunner().invoke(cli, ["bench", *arguments])


def test_overhead_prints_one_row():
    result = bench("overhead", "--requests", "200", "--batch", "32")
    assert result.exit_code == 0, result.output
    header, rule, row = result.stdout.splitlines()
    assert header.split() == ["requests", "seconds", "requests/s", "tokens/s", "us/request"]
    assert set(rule) == {"-", " "}
    requests, _, rate, tokens, cost = map(float, row.split())
    assert requests == 200
    assert tokens == pytest.approx(32 * rate, rel=0.05)
    assert cost == pytest.approx(1e6 / rate, rel=0.05)


def test_overhead_can_say_where_the_time_went():
    result = bench("overhead", "--requests", "300", "--batch", "32", "--profile")
    assert result.exit_code == 0, result.output
    assert "CPU time per request" in result.stdout


def test_sockets_prints_itself_beside_files():
    result = bench("sockets", "--requests", "60", "--batch", "32", "--connections", "3", "--stream")
    assert result.exit_code == 0, result.output
    _, _, *rows = result.stdout.splitlines()
    assert [row.split()[:2] for row in rows] == [["sockets", "60"], ["files", "60"]]


def test_compare_prints_ratios_to_the_peer(monkeypatch):
    def measure(name, seconds, tokens):
        class Fake:
            def __init__(self, folder, dtype, threads):
                assert (folder / "model.safetensors").stat().st_size > 0
                assert (dtype, threads) == ("float32", 1)

            def run(self, workload):
                output = sum(length for _, length in workload.requests)
                result = Measurement(name, workload.name, seconds, output, len(workload.requests), 10.0, 2.0)
                return result, [tokens] * len(workload.requests)

            def close(self):
                pass

        Fake.name = name
        return Fake

    monkeypatch.setattr(comparing, "SageLLM", measure("ours", 2.0, [1, 2]))
    monkeypatch.setitem(comparing.PEERS, "transformers", measure("theirs", 5.0, [1, 2]))
    result = bench("compare", "--workload", "overhead", "--dtype", "float32", "--threads", "1")
    assert result.exit_code == 0, result.output
    ours, theirs = (line for line in result.stdout.splitlines() if line.startswith("overhead "))
    assert ours.split() == ["overhead", "ours", "2.00", "10", "2.0", "4096.0", "128.0", "2.50x", "100%"]
    assert theirs.split()[-1] == "1.00x"
    assert "llama.cpp" in result.stdout  # what others are known to reach


def test_kernels_prints_the_chosen_operations_and_the_rates_behind_their_floors():
    options = ["--threads", "1", "--backend", "cpu", "--operation", "elementwise", "--seconds", "0"]
    result = bench("kernels", *options)
    assert result.exit_code == 0, result.output
    title, header, _, *rows, rates = result.stdout.splitlines()
    assert title.startswith("cpu, torch.")
    assert header.split() == ["operation", "rows", "ms", "floor", "ms", "of", "the", "floor"]
    for operation in ("add_rms_norm", "apply_rope"):
        assert [row.split()[1] for row in rows if row.startswith(operation)] == ["1", "16", "512"]
    assert all(float(row.split()[2]) > 0 and row.endswith("%") for row in rows)
    assert rates.startswith("read ") and "1 threads" in rates


def test_kv_trace_prints_a_row_for_each_size_and_policy(tmp_path):
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"hash_ids": [0, 1]}\n{"hash_ids": [0, 2]}\n')
    result = bench("kv-trace", "--trace", str(trace), "--blocks", "2", "--blocks", "0")
    assert result.exit_code == 0, result.output
    header, _, *rows = map(str.split, result.stdout.splitlines())
    assert header == ["blocks", "policy", "hit", "rate", "time", "saved", "lookups/s"]
    policies = [policy.value for policy in KVEviction]
    assert [row[:3] for row in rows] == [[size, p, "25.00%"] for size in ("2", "unlimited") for p in policies]
    result = bench("kv-trace", "--trace", str(trace), "--eviction", "COST")
    assert [line.split()[1] for line in result.stdout.splitlines()[2:]] == ["cost"] * 4


def test_a_pool_that_the_trace_does_not_fit_is_a_wrong_option(tmp_path):
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"hash_ids": [0, 1, 2]}\n')
    result = bench("kv-trace", "--trace", str(trace), "--blocks", "2")
    assert result.exit_code == 2
    assert "Invalid value for --blocks: 2 blocks do not hold the longest request of the trace" in result.output


def test_simulation_sets_the_real_engine_beside_the_simulator():
    """On a device that only takes time."""
    arguments = ("--device", "h200", "--shape", "tiny", "--requests", "6", "--rate", "100")
    result = bench("simulation", *arguments)
    assert result.exit_code == 0, result.output
    header, _, *rows = result.stdout.splitlines()
    assert header.split() == ["figure", "measured", "predicted", "error"]
    names = [f"{name} {figure} ms" for name in ("TTFT", "TPOT") for figure in ("mean", "p50", "p99")]
    assert [row[:15].strip() for row in rows] == [*names, "output tokens/s"]
    assert all(float(value) > 0 for row in rows for value in row[15:].split()[:2])


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["kernels", "--operation", "atention"], 2, "no operation 'atention'; there is: linear, attention"),
        (["kernels", "--backend", "gpu"], 2, "'cpu', 'cuda'"),
        (["compare", "--workload", "cpu-tripple"], 2, "cpu-single, cpu-batch, cpu-prefix, overhead"),
        (["compare", "--peer", "nobody"], 2, "no peer 'nobody'; there is: transformers"),
        (["overhead", "--requests", "0"], 2, "--requests"),
        (["simulation", "--shape", "tinny"], 2, "no shape 'tinny'; there is: qwen2.5-0.5b"),
        (["simulation", "--shape", "tiny", "--device", "h201"], 2, "no device 'h201'; there is: local, h200"),
        (["kv-trace"], 2, "Missing option '--trace'"),
        (["kv-trace", "--trace", "nowhere.jsonl"], 2, "'nowhere.jsonl' does not exist"),
        (["kv-trace", "--trace", __file__, "--eviction", "fifo"], 2, "'lru', 'lfu', 'cost'"),
        (["kv-trace", "--trace", __file__], 78, "test_bench.py:1: found"),
    ],
)
def test_what_is_not_there_is_refused_by_name(arguments, code, said):
    result = bench(*arguments)
    assert result.exit_code == code
    assert said in result.output
