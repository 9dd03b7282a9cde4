"""What the operators of one pipeline share."""

from __future__ import annotations

import pytest

from sageLLM.config import SageLLMConfig
from sageLLM.errors import ConfigError
from sageLLM.runtime.services import EngineServices


@pytest.mark.parametrize("backend", [{"backend_type": "cuda"}, {"device_ids": [1]}, {"threads": 2}])
def test_the_null_model_refuses_a_device(backend):
    config = SageLLMConfig.model_validate({"model": {"model_id": "builtin:null"}, "backend": backend})
    with pytest.raises(ConfigError, match="leave backend_type, device_ids, threads and cpu_kernels out"):
        EngineServices(config).load()
