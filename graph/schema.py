"""The JSON Schema of a pipeline file, for editors that complete and check while one types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..config import SageLLMConfig

if TYPE_CHECKING:
    from .operator_spec import OperatorSpec

_REFERENCE = {"type": "string", "pattern": r"\$\{[^{}]*\}"}
_NOTES = ("title", "description", "default")
_NODE_NAME = "^[A-Za-z_][A-Za-z0-9_-]*$"


def pipeline_schema(specs: dict[str, OperatorSpec]) -> dict[str, Any]:
    """JSON Schema (2020-12) of a pipeline that may use the given operator types."""
    definitions: dict[str, Any] = {}
    engine = _collect(SageLLMConfig, "engine", definitions)
    cases = []
    for name, spec in specs.items():
        reference = _collect(spec.config_model, f"operator.{name}", definitions)
        fields = definitions[f"operator.{name}"]
        fields["description"] = spec.summary
        fields["properties"] = {"type": {"const": name}, **fields.get("properties", {})}
        cases.append({"if": {"required": ["type"], "properties": {"type": {"const": name}}}, "then": reference})
    definitions["typed operator"] = {
        "type": "object",
        "required": ["type"],
        "properties": {"type": {"enum": list(specs), "description": "the operator type; by default the node's name"}},
        "allOf": cases,
    }
    typed = {"$ref": "#/$defs/typed operator"}
    named = {
        name: {
            "description": spec.summary,
            "if": {"type": "object", "required": ["type"]},
            "then": typed,
            "else": {"anyOf": [{"type": "null"}, {"$ref": f"#/$defs/operator.{name}"}]},
        }
        for name, spec in specs.items()
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "sageLLM pipeline",
        "type": "object",
        "required": ["operators", "edges"],
        "additionalProperties": False,
        "properties": {
            "name": {"type": "string", "description": "the pipeline's name; by default the file's"},
            "vars": {
                "type": "object",
                "description": "parameters with their defaults, read as ${name} and set with --set name=value",
            },
            "engine": {"anyOf": [{"type": "null"}, engine], "description": "model, KV cache, scheduler and device"},
            "operators": {
                "type": "object",
                "minProperties": 1,
                "description": "the operators by name",
                "properties": named,
                "additionalProperties": typed,
                "propertyNames": {"pattern": _NODE_NAME},
            },
            "edges": {
                "type": "array",
                "minItems": 1,
                "description": "chains such as `a -> b -> c`; a port is written `a.error`, all error ports `*.error`",
                "items": {"type": "string", "pattern": "->"},
            },
            "max_error_ratio": {
                "anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"type": "null"}, _REFERENCE],
                "description": "the share of failed records above which the run stops with exit code 1",
            },
        },
        "$defs": definitions,
    }


def _collect(model: Any, name: str, definitions: dict[str, Any]) -> dict[str, str]:
    """Move a model's schema and those it refers to into `definitions`; returns the reference to it."""
    schema = model.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
    for inner, definition in schema.pop("$defs", {}).items():
        definitions[f"{name}.{inner}"] = _allow_references(definition)
    definitions[name] = _allow_references(schema)
    return {"$ref": f"#/$defs/{name}"}


def _allow_references(schema: dict[str, Any]) -> dict[str, Any]:
    """Any field may also be written as `${name}`, any enum in upper case."""
    if "enum" in schema:
        schema["enum"] = [*schema["enum"], *(word.upper() for word in schema["enum"])]
    if "properties" in schema:
        schema["properties"] = {
            field: {
                **{key: rule[key] for key in _NOTES if key in rule},
                "anyOf": [{key: value for key, value in rule.items() if key not in _NOTES}, _REFERENCE],
            }
            for field, rule in schema["properties"].items()
        }
    return schema
