"""The names that a program may import, and what importing them costs."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import sageLLM

NAMES = [
    "BackendConfig", "BenchmarkConfig", "GenerateOutput", "GenerateRequest", "InferenceMode", "KVCacheConfig",
    "KVGranularity", "ModelConfig", "SageLLMConfig", "SageLLMEngine", "SageLLMError", "SchedulerConfig",
    "SchedulerMode", "SchedulerPolicy",
]  # fmt: skip
SUBMODULES = ["accel", "backends", "benchmarks", "graph", "kv_runtime", "models", "operators", "runtime"]


def test_the_exported_names():
    assert sorted(sageLLM.__all__) == NAMES
    assert dir(sageLLM) == sorted([*NAMES, *SUBMODULES])
    namespace = {}
    exec("from sageLLM import *", namespace)
    assert set(NAMES) <= set(namespace)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there_and_says_where_it_lives(name):
    found = getattr(sageLLM, name)
    assert found.__name__ == name
    assert getattr(importlib.import_module(found.__module__), name) is found


@pytest.mark.parametrize("name", SUBMODULES)
def test_the_submodules(name):
    assert getattr(sageLLM, name) is importlib.import_module(f"sageLLM.{name}")
    assert importlib.import_module(f"sageLLM.{name}").__name__ == f"sageLLM.{name}"


def test_any_other_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Nonsense"):
        _ = sageLLM.Nonsense
    with pytest.raises(ImportError):
        exec("from sageLLM import Nonsense")


@pytest.mark.parametrize("code", ["import sageLLM", "from sageLLM import SageLLMConfig, GenerateRequest"])
def test_importing_loads_no_torch(code):
    check = f"import sys; {code}; print([m for m in ('torch', 'transformers', 'networkx', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_the_operator_writers_names():
    from sageLLM import operators

    for name in ("ERROR_PORT", "Operator", "OperatorConfig", "Outlet", "Port", "RecordKind", "operator",
                 "register_function"):  # fmt: skip
        assert name in operators.__all__
        assert hasattr(operators, name)
