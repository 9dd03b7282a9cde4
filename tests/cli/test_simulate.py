"""`sagellm simulate`: a row for each combination, the same ones every time."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner

from sageLLM.accel.device_presets import DEVICES
from sageLLM.accel.model_work import ModelDimensions
from sageLLM.accel.step_cost import StepCost
from sageLLM.cli.main import cli
from sageLLM.config import SageLLMConfig
from sageLLM.errors import ConfigError
from sageLLM.graph import Pipeline
from sageLLM.runtime.simulation.engine import Stages

PIPELINE = """
engine:
  model: {model_id: nowhere, num_layers: 32, num_heads: 32, hidden_size: 4096, vocab_size: 1000, max_seq_len: 4096}
  kv_cache: {max_tokens: 8192}
  scheduler: {max_batch_size: 4, max_decode_batch: 4}
operators:
  source: {type: jsonl_source, path: in.jsonl, on_error: drop}
  tokenize: {on_error: drop}
  kv_lookup:
  schedule: {on_error: drop}
  prefill: {on_error: drop}
  kv_commit:
  decode: {on_error: drop}
  detokenize: {on_error: drop}
  sink: {type: jsonl_sink, path: out.jsonl}
edges:
  - source -> tokenize -> kv_lookup -> schedule -> prefill -> kv_commit -> decode -> detokenize -> sink
"""


@pytest.fixture
def simulate(tmp_path, monkeypatch):
    monkeypatch.setattr("sageLLM.runtime.garbage.collect_rarely", lambda: None)
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    lines = [
        {"timestamp": 3 * k, "input_length": 900, "output_length": 4 + k % 5, "hash_ids": [k % 3, 100 + k]}
        for k in range(30)
    ]
    (tmp_path / "trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def run(*arguments):
        line = ["simulate", str(tmp_path / "pipeline.yaml"), "--trace", str(tmp_path / "trace.jsonl"), *arguments]
        return CliRunner().invoke(cli, line)

    return run


def rows(result):
    """The cells of the table but for the last one, the time that the simulation took."""
    assert result.exit_code == 0, result.output
    return [line.split()[:-1] for line in result.stdout.splitlines()[2:]]


def test_the_same_input_gives_the_same_rows(simulate):
    options = ["--mode", "hybrid", "--mode", "time_share", "--policy", "SHORTEST_JOB"]
    options += ["--eviction", "cost", "--workers", "1", "--workers", "2"]
    options += ["--rate-scale", "1", "--rate-scale", "3", "--routing", "prefix_aware"]
    options += ["--ttft-slo-ms", "100", "--tpot-slo-ms", "50", "--ttft-slo-ms", "1000", "--tpot-slo-ms", "8"]
    table = rows(simulate(*options))
    assert len(table) == len({tuple(row[:5]) for row in table}) == 8
    assert {tuple(row[5:7]) for row in table} == {("30", "30")}
    assert len({tuple(row[7:]) for row in table}) > 5
    assert rows(simulate(*options)) == table


def test_a_slower_device_takes_longer_and_the_limit_holds(simulate):
    (fast,), (slow,) = (rows(simulate("--limit", "5", "--device", device)) for device in ("h200", "a100"))
    assert fast[:7] == ["hybrid", "fcfs", "lru", "1", "1", "5", "5"]
    assert float(fast[7]) < float(slow[7])


def test_tiers_have_hit_rates_of_their_own(simulate):
    tiers = "enable_tiering=true", "nvme_path=/nonexistent", "nvme_tokens=99999", "ddr_tokens=4096", "max_tokens=2048"
    result = simulate(*(f"--set=engine.kv_cache.{each}" for each in tiers))
    header, _, row = (re.split(r"  +", line.strip()) for line in result.stdout.splitlines())
    shares = {name: float(row[header.index(name)].rstrip("%")) for name in ("hit rate", "of DDR", "of NVME")}
    assert shares["hit rate"] > shares["of DDR"] > 0
    assert rows(simulate(*(f"--set=engine.kv_cache.{each}" for each in tiers))) == rows(result)
    assert "of DDR" not in simulate().stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--device", "h2000"], 2, "no device 'h2000'; there is: local, h200, h100, a100"),
        (["--mode", "hybrid", "--workers", "1+1"], 2, "--workers 1+1 is not for mode hybrid: add 2"),
        (["--workers", "none"], 2, "'none' is no number of workers: write 2, or 1+1"),
        (["--policy", "lifo"], 2, "'fcfs'"),
        (["--set", "engine.kv_cache.max_tokens=100000000000"], 78, "kv_cache.max_tokens: found 100000000000"),
        (["--rate-scale", "0"], 2, "--rate-scale"),
        (
            ["--policy", "longest_prefix", "--set", "engine.kv_cache.enable_prefix_caching=false"],
            78,
            "hybrid, longest_prefix: engine: scheduler.policy longest_prefix needs prefixes",
        ),
        (["--ttft-slo-ms", "5", "--ttft-slo-ms", "9"], 2, "2 --ttft-slo-ms, but 1 --tpot-slo-ms: give pairs"),
    ],
)
def test_what_cannot_be_simulated_is_refused(simulate, arguments, code, said):
    result = simulate(*arguments)
    assert result.exit_code == code, result.output
    assert said in result.output


def test_without_a_worker_there_is_nothing_to_simulate(tmp_path):
    with pytest.raises(ConfigError, match="'idle' has no 'schedule' stage"):
        Stages.of(Pipeline("idle", SageLLMConfig(), {}, [], tmp_path))


def test_the_h200_has_the_speed_that_its_documentation_says():
    """qwen2.5-7b: seconds for one token, for 16 prompts of 4,096 tokens, for 256 x (512 in, 256 out)."""
    cost = StepCost(ModelDimensions(28, 28, 4, 128, 3584, 18944, 152064), DEVICES["h200"].rates)
    assert cost.step_seconds([256], [], []) == pytest.approx(4.79e-3, rel=0.01)
    assert 8 * cost.step_seconds([], [0, 0], [4096, 4096]) == pytest.approx(1.47, rel=0.01)
    decode = sum(cost.step_seconds([512 + k] * 256, [], []) for k in range(256))
    assert decode + 16 * cost.step_seconds([], [0] * 16, [512] * 16) == pytest.approx(5.24, rel=0.01)
