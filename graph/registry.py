"""Operator types by name: those of the package, those of installed plug-ins, those of modules the user allowed."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .operator_spec import OperatorSpec

ENTRY_POINT_GROUP = "sagellm.operators"
FOR_PROGRAMS = frozenset({"call_source", "call_sink"})  # both ends of SageLLMEngine's pipeline: files hang with them

_SPECS: dict[str, OperatorSpec] = {}


def register(spec: OperatorSpec) -> None:
    """Add an operator type.

    Raises:
        ConfigError: the name is taken by another class.
    """
    known = _SPECS.get(spec.name)
    if known is not None and known.factory.__qualname__ != spec.factory.__qualname__:
        owner = known.factory.__module__
        raise ConfigError(f"operator {spec.name!r} is already registered by {owner}: choose another name")
    _SPECS[spec.name] = spec


def load_plugins() -> None:
    """Import every installed plug-in of the entry-point group.

    Raises:
        ConfigError: a plug-in cannot be imported.
    """
    from importlib.metadata import entry_points

    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry.load()
        except Exception as error:
            raise ConfigError(f"operator plug-in {entry.name} = {entry.value} cannot be imported: {error}") from error


def load_modules(modules: Iterable[str]) -> None:
    """Import the modules that the command line allows.

    Raises:
        ConfigError: a module cannot be imported.
    """
    for module in modules:
        try:
            import_module(module)
        except Exception as error:
            raise ConfigError(f"--allow-module {module} cannot be imported: {error!r}") from error


def find_spec(name: str) -> OperatorSpec | None:
    """The operator type of that name, or None."""
    return _SPECS.get(name)


def all_specs() -> dict[str, OperatorSpec]:
    """Every registered operator type that a pipeline file may name, sorted by name."""
    return {name: spec for name, spec in sorted(_SPECS.items()) if name not in FOR_PROGRAMS}
