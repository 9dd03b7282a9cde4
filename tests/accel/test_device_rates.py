"""The roofline: rates by rows, bytes, launch; and rates as plain values."""

from __future__ import annotations

import json

import pytest

from sageLLM.accel.device_rates import DeviceRates, OperationRates
from sageLLM.accel.execution_graph import Node, NodeKind


def test_time_is_linear_between_the_measured_rows():
    rates = OperationRates((1, 4, 16), (1e9, 2e9, 8e9), bytes_per_s=1e15)
    flops = 1e6  # a row
    at = {rows: rates.seconds(rows, flops * rows, 0) for rows in (1, 4, 10, 16, 32)}
    assert at[1] == pytest.approx(1e-3)
    assert at[4] == pytest.approx(2e-3)
    assert at[16] == pytest.approx(2e-3)
    assert at[10] == pytest.approx(2e-3)
    assert at[32] == pytest.approx(4e-3), "more rows go at the last rate"


def test_fewer_rows_than_measured_take_as_long_as_the_fewest():
    rates = OperationRates((4, 16), (2e9, 8e9), bytes_per_s=1e15)
    assert rates.seconds(1, 1e6, 0) == pytest.approx(rates.seconds(4, 4e6, 0))


def test_bytes_bound_it_from_below_and_a_launch_comes_on_top():
    rates = OperationRates((1,), (1e12,), bytes_per_s=1e9, launch_s=1e-4)
    assert rates.seconds(1, 1e6, 1e6) == pytest.approx(1e-3 + 1e-4)
    assert rates.seconds(1, 1e10, 1e6) == pytest.approx(1e-2 + 1e-4)


@pytest.mark.parametrize(
    ("rows", "rates", "bandwidth"),
    [((), (), 1.0), ((1, 2), (1.0,), 1.0), ((2, 1), (1.0, 1.0), 1.0), ((0,), (1.0,), 1.0), ((1,), (0.0,), 1.0),
     ((1,), (1.0,), 0.0)],
)  # fmt: skip
def test_impossible_rates_are_refused(rows, rates, bandwidth):
    with pytest.raises(ValueError, match="ro|rate"):
        OperationRates(rows, rates, bandwidth)


def test_rates_survive_json(rates):
    again = DeviceRates.from_dict(json.loads(json.dumps(rates.to_dict())))
    assert again == rates


def test_a_data_sheet_knows_every_kind():
    rates = DeviceRates.from_specification(989e12, 4.8e12)
    for kind in NodeKind:
        link = "interconnect" if kind.is_comm else "ddr" if kind.is_transfer else ""
        assert rates.node_seconds(Node("x", kind, rows=1, flops=1, num_bytes=1, link=link)) >= 0


def test_a_receive_waits_and_takes_no_time(rates):
    assert rates.node_seconds(Node("x", NodeKind.COMM_RECV, link="interconnect")) == 0
