"""`*.error -> dead`: one chain for all error ports that no other chain names."""

from __future__ import annotations

import pytest

from sageLLM.errors import PipelineError
from sageLLM.graph import load_pipeline


@pytest.fixture
def load(good, tmp_path):
    """Load the good pipeline with its last three chains, those of the error ports, replaced."""

    def load(*chains, edit=lambda text: text):
        head = edit(good[: good.index("  - read.error")])
        path = tmp_path / "p.yaml"
        path.write_text(head + "".join(f'  - "{chain}"\n' for chain in chains))
        return load_pipeline(path)

    return load


def problems_of(load, *chains, **options):
    with pytest.raises(PipelineError) as raised:
        load(*chains, **options)
    return [problem.split("p.yaml:")[1] for problem in raised.value.problems]


def error_edges(pipeline):
    return {edge.source: edge.target for edge in pipeline.edges if edge.source_port == "error"}


def test_it_wires_every_error_port(load):
    pipeline = load("*.error -> dead")
    assert error_edges(pipeline) == {"read": "dead", "tokenize": "dead", "decode": "dead"}
    assert all(edge.kinds == {"dead_letter"} for edge in pipeline.edges if edge.source_port == "error")


def test_ports_that_are_named_keep_their_own_edge(load):
    pipeline = load("*.error -> dead", "decode.error -> write")
    assert error_edges(pipeline) == {"read": "dead", "tokenize": "dead", "decode": "write"}


def test_what_drops_its_bad_records_or_stops_on_them_has_no_edge(load):
    pipeline = load("*.error -> dead", edit=lambda text: text.replace("tokenize:\n", "tokenize: {on_error: drop}\n"))
    assert error_edges(pipeline) == {"read": "dead", "decode": "dead"}


def test_what_lies_downstream_of_it_is_left_out(load):
    problems = problems_of(load, "*.error -> tokenize")
    assert any("read.error gives dead_letter, but tokenize.in takes request" in problem for problem in problems)
    assert any("the error port of 'decode' is not wired" in problem for problem in problems)
    assert not any("cycle" in problem for problem in problems)


def test_echo_keeps_it_as_it_was_written(load):
    assert load("*.error -> dead").to_dict()["edges"][-1] == "*.error -> dead"


def test_an_unknown_target_is_the_only_problem(load):
    problems = problems_of(load, "*.error -> ded")
    assert problems == ["20:17: no operator 'ded' under operators; did you mean 'dead'?"]


def test_nothing_left_to_wire_is_a_problem(load):
    assert problems_of(load, "*.error -> dead", "  *.error -> write") == [
        "21:8: no error port is left for `*.error`; remove this chain"
    ]


@pytest.mark.parametrize("chain", ["*.out -> dead", "* -> dead", "decode.error -> *.error"])
def test_no_other_wildcard_is_known(load, chain):
    problems = problems_of(load, "*.error -> dead", chain)
    column = chain.index("*") + 6 if chain[0] != "*" else 5
    assert f"21:{column}: found {chain.split(' -> ')[chain.index('*') > 0]!r}; only `*.error` stands" in problems[0]
