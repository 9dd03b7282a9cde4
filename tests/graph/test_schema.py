"""The JSON Schema of pipelines: whole, and at one with what the loader accepts."""

from __future__ import annotations

from typing import Any

import pytest

from sageLLM.graph.registry import all_specs
from sageLLM.graph.schema import pipeline_schema


@pytest.fixture
def schema(fake_operators: None) -> dict[str, Any]:
    return pipeline_schema(all_specs())


def references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [ref for item in value.values() for ref in references(item)]
    return [ref for item in value for ref in references(item)] if isinstance(value, list) else []


def test_every_reference_leads_somewhere(schema: dict[str, Any]) -> None:
    found = references(schema)
    assert found
    assert {ref.removeprefix("#/$defs/") for ref in found} <= set(schema["$defs"])


def test_every_operator_has_its_fields(schema: dict[str, Any]) -> None:
    for name, spec in all_specs().items():
        fields = schema["$defs"][f"operator.{name}"]
        assert set(fields["properties"]) == {"type", *spec.config_model.model_fields}
        assert fields["additionalProperties"] is False
    assert schema["$defs"]["operator.read"]["required"] == ["path"]
    assert set(schema["properties"]["operators"]["properties"]) == set(all_specs())


def test_any_field_may_be_a_reference(schema: dict[str, Any]) -> None:
    field = schema["$defs"]["operator.decode"]["properties"]["max_batch"]
    assert field["default"] == 8
    assert field["anyOf"] == [
        {"type": "integer", "exclusiveMinimum": 0},
        {"type": "string", "pattern": r"\$\{[^{}]*\}"},
    ]
