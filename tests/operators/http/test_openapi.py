"""/openapi.json, and schemathesis over it: what is described is what is done."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from sageLLM.operators.sources.openai.endpoints import ENDPOINTS
from sageLLM.operators.sources.openai.openapi import describe

from .conftest import serving

DESCRIBED = schemathesis.openapi.from_dict(describe(ENDPOINTS, has_keys=False))
CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    negative_data_rejection,
]  # fmt: skip


@pytest.fixture(scope="module")
def short_server():
    """A server of the null model, whose answers end soon also where nobody says when."""
    with serving("model=builtin:null", "engine.model.max_seq_len=512") as server:
        yield server


def test_it_is_served(null_server):
    status, headers, document = null_server.exchange("GET", "/openapi.json")
    assert (status, headers["content-type"]) == (200, "application/json")
    assert document == describe(ENDPOINTS, has_keys=False)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.path)
def test_the_api_does_what_it_describes(short_server, endpoint, mode):
    operation = DESCRIBED[endpoint.path][endpoint.method]
    if mode is GenerationMode.NEGATIVE and endpoint.body is None:
        pytest.skip("nothing to get wrong")

    @settings(max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck])
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
        base = f"http://127.0.0.1:{short_server.port}"
        case.call_and_validate(base_url=base, checks=CHECKS, timeout=20)

    check()


def test_keys_are_described_where_there_are_any():
    document = describe(ENDPOINTS, has_keys=True)
    assert document["paths"]["/v1/models"]["get"]["security"] == [{"bearer": []}]
    assert "401" in document["paths"]["/v1/completions"]["post"]["responses"]
    assert "security" not in document["paths"]["/health"]["get"]
    assert "securitySchemes" not in describe(ENDPOINTS, has_keys=False)["components"]
