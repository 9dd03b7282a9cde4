"""What a request may say of its output's form, in its own lines, in batch lines and in a program."""

from __future__ import annotations

import json

import pytest

from sageLLM import GenerateRequest
from sageLLM.errors import RequestError
from sageLLM.operators.sources.request_format import parse_request
from sageLLM.records import Guide, GuideKind

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"const": "ü"}}, "required": ["b"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "description": "d", "strict": True, "schema": SCHEMA}}
GIVEN = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": None, "guided_regex": None, "guided_grammar": None}, None),
    ({"response_format": {"type": "json_object"}}, Guide(GuideKind.JSON_OBJECT)),
    ({"guided_regex": "a+"}, Guide(GuideKind.REGEX, "a+")),
    ({"guided_grammar": 'start: "a"'}, Guide(GuideKind.GRAMMAR, 'start: "a"')),
    ({"guided_regex": "a+", "response_format": {"type": "text"}}, Guide(GuideKind.REGEX, "a+")),
]


def own_line(**fields):
    return parse_request(json.dumps({"prompt": "p", **fields}).encode(), "line-1").guide


def batch_line(**fields):
    line = {"custom_id": "c", "body": {"messages": [{"role": "user", "content": "q"}], **fields}}
    return parse_request(json.dumps(line).encode(), "line-1").guide


def call(**fields):
    return GenerateRequest(prompt="p", **fields).to_record().guide


@pytest.mark.parametrize("read", [own_line, batch_line, call])
@pytest.mark.parametrize(("fields", "guide"), GIVEN)
def test_all_ways_in_say_it_alike(read, fields, guide):
    assert read(**fields) == guide


@pytest.mark.parametrize("read", [own_line, batch_line, call])
def test_a_schema_keeps_the_order_of_its_properties(read):
    guide = read(response_format=FORMAT)
    assert guide.kind is GuideKind.JSON_SCHEMA
    assert [*json.loads(guide.source)["properties"]] == ["b", "a"]
    assert guide == read(response_format={**FORMAT, "json_schema": {"name": "other", "schema": SCHEMA}})


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        (
            {"guided_regex": "a", "guided_grammar": "start: x"},
            "found guided_regex and guided_grammar: an output conforms to one of them, write one",
        ),
        (
            {"guided_regex": "a", "response_format": {"type": "json_object"}},
            "found response_format and guided_regex: an output conforms to one of them, write one",
        ),
        (
            {"response_format": {"type": "json_schema"}},
            'response_format of type json_schema: found no json_schema, write {"name": ..., "schema": {...}}',
        ),
        (
            {"response_format": {"type": "json_object", "json_schema": {"schema": {}}}},
            "response_format of type json_object: found a json_schema too, write type json_schema, or leave it out",
        ),
        (
            {"response_format": {"type": "json"}},
            "response_format.type: found 'json', should be 'text', 'json_object' or 'json_schema'",
        ),
        ({"response_format": {"typ": "text"}}, "unknown field 'response_format.typ': did you mean 'type'?"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "nam": "x"}}},
            "unknown field 'response_format.json_schema.nam': did you mean 'name'?",
        ),
        ({"guided_regex": ""}, "guided_regex: found '', but string should have at least 1 character"),
        ({"guided_regex": ["a"]}, "guided_regex: found ['a'], should be a valid string"),
    ],
)
def test_what_it_must_not_say(fields, error):
    with pytest.raises(RequestError) as caught:
        own_line(**fields)
    assert error in str(caught.value)
