"""A registry of small operators that only declare themselves; the graph never runs one."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from pydantic import Field

from sageLLM.graph import registry
from sageLLM.runtime.flow.operator import ERROR_PORT, Operator, OperatorConfig, Port, RecordKind, operator

REQUEST, SEQUENCE, DELTA = RecordKind.REQUEST, RecordKind.SEQUENCE, RecordKind.DELTA
COMPLETION, DEAD = RecordKind.COMPLETION, RecordKind.DEAD_LETTER


class PathConfig(OperatorConfig):
    path: str


class AddressConfig(OperatorConfig):
    port: int
    host: str = "127.0.0.1"


class EventsConfig(OperatorConfig):
    max_events: int = 9


class BatchConfig(OperatorConfig):
    max_batch: Annotated[int, Field(gt=0)] = 8


def port(name: str, *kinds: RecordKind, **more: Any) -> Port:
    return Port(name, frozenset(kinds) or frozenset(RecordKind), **more)


def declare(name: str, inputs: tuple[Port, ...], outputs: tuple[Port, ...], **attributes: Any) -> None:
    values = {"__doc__": f"Fake {name}.", "guarantee": "none", "inputs": inputs, "outputs": outputs, **attributes}
    operator(name)(type(name, (Operator,), values))


@pytest.fixture
def fake_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    import sageLLM.operators  # noqa: F401  (so that a later import registers nothing)

    monkeypatch.setattr(registry, "_SPECS", {})
    out = port("out", REQUEST)
    declare("read", (), (out, ERROR_PORT), config_model=PathConfig, reads="path")
    declare("tokenize", (port("in", REQUEST),), (port("out", SEQUENCE), ERROR_PORT))
    declare(
        "prefill", (port("in", SEQUENCE),), (port("out", SEQUENCE),), provides=frozenset({"prefilled"}), single=True
    )
    declare(
        "decode",
        (port("in", SEQUENCE),),
        (port("out", SEQUENCE, DELTA), ERROR_PORT),
        config_model=BatchConfig,
        requires=frozenset({"prefilled"}),
        provides=frozenset({"decoded"}),
    )
    declare("detokenize", (port("in", SEQUENCE, DELTA),), (port("out", COMPLETION),), requires=frozenset({"decoded"}))
    declare("serve", (), (out,), answered_by="write_back")
    declare("listen", (), (out,), config_model=AddressConfig)
    declare("write_back", (port("in", COMPLETION, DEAD),), ())
    declare("write", (port("in", COMPLETION, DEAD),), (), config_model=PathConfig, writes="path")
    declare("filter", (port("in"),), (port("out", same_as="in"), port("rejected", same_as="in", optional=True)))
    declare("look", (port("in", SEQUENCE),), (port("out", SEQUENCE),), precedes=frozenset({"prefilled"}))
    events = port("events", SEQUENCE, optional=True, setting="max_events")
    declare("watch", (port("in", SEQUENCE),), (port("out", SEQUENCE), events), config_model=EventsConfig)
    declare("measure", (port("in"),), (port("out", same_as="in"),), provides=frozenset({"measured"}))
    declare("tee", (port("in"),), (port("left", same_as="in"), port("right", same_as="in")))
    declare("merge", (port("left"), port("right")), (port("out", same_as="left"),))


GOOD = """\
name: good
vars:
  input: questions.jsonl
  batch: 8
operators:
  read:
    path: ${input}
  tokenize:
  prefill: {}
  decode:
    max_batch: ${batch}
  detokenize:
  write:
    path: answers.jsonl
  dead:
    type: write
    path: dead.jsonl
edges:
  - read -> tokenize -> prefill -> decode -> detokenize -> write
  - read.error -> dead
  - tokenize.error -> dead
  - decode.error -> dead
"""


@pytest.fixture
def good(fake_operators: None) -> str:
    """The text of a pipeline with no problem, over the fake operators."""
    return GOOD
