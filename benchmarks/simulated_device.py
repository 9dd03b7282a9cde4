"""The devices of `sagellm simulate`: presets, and this machine as measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..accel.device_presets import DEVICES
from ..accel.step_cost import StepCost
from ..errors import ConfigError
from ..runtime.memory import check_kv_pool
from ..runtime.services import EngineServices
from ..runtime.simulation.engine import Target

if TYPE_CHECKING:
    from ..config import SageLLMConfig

LOCAL = "local"
_ELEMENT_BYTES = 2  # presets are bfloat16


def make_target(config: SageLLMConfig, device: str) -> Target:
    """The configured model on a device; "local" is this machine's, whose rates are measured if they never were.

    Raises:
        ConfigError: there is no such device, or weights and KV pool do not fit its memory.
        ModelNotFoundError, CheckpointError, NotAvailableError: the model's dimensions cannot be had.
    """
    services = EngineServices(config)
    if device == LOCAL:
        return Target(services.model, services.backend_name, services.step_cost)
    preset = DEVICES.get(device)
    if preset is None:
        raise ConfigError(f"no device {device!r}; there is: {LOCAL}, {', '.join(DEVICES)}")
    architecture, kv = services.model.architecture, config.kv_cache
    cost = StepCost(architecture, preset.rates, _ELEMENT_BYTES)
    free = preset.memory_bytes - _ELEMENT_BYTES * architecture.num_parameters
    if free < 0:
        raise ConfigError(f"{config.model.model_id} does not fit into the {preset.memory_bytes} bytes of {device}")
    check_kv_pool(kv, cost.kv_bytes_per_token * kv.block_size, free)
    return Target(services.model, device, cost)
