"""docs/guarantees.md is what the sources and sinks themselves say."""

from __future__ import annotations

import re
from pathlib import Path

import sageLLM.operators  # noqa: F401 - registers the built-in operators
from sageLLM.graph.registry import all_specs

TABLE = (Path(__file__).parents[2] / "docs/guarantees.md").read_text(encoding="utf-8")


def test_the_table_says_what_the_classes_say():
    promised = {
        name: spec.guarantee
        for name, spec in all_specs().items()
        if re.match(r"sageLLM\.operators\.(sources|sinks)\.", spec.factory.__module__)
    }
    assert dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", TABLE, re.MULTILINE)) == promised
    assert all(promised.values())
