"""Operator types by name: those of the package, those of installed plug-ins, those of modules the user allowed."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import ConfigError, SageLLMError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .operator_spec import OperatorSpec

ENTRY_POINT_GROUP = "sagellm.operators"
FOR_PROGRAMS = frozenset({"call_source"})  # where SageLLMEngine's requests come in: files hang with it

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
            raise ConfigError(f"--allow-module {module}: {_explain_import(module, error)}") from error


def _explain_import(module: str, error: Exception) -> str:
    """Why a module cannot be imported: `file:line: what`, unless it is not there."""
    from os.path import relpath
    from pathlib import PurePath
    from traceback import extract_tb

    if "/" in module or module.endswith(".py"):
        return f"write the module's name, without .py: {PurePath(module).stem}"
    if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
        return f"no module {error.name!r} in the current directory or installed"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{relpath(error.filename)}:{error.lineno}: {error.msg}"
    text = str(error) if isinstance(error, SageLLMError) else f"{type(error).__name__}: {error}"
    lines = [at for at in extract_tb(error.__traceback__) if at.name == "<module>"]
    return f"{relpath(lines[0].filename)}:{lines[0].lineno}: {text}" if lines else text


def find_spec(name: str) -> OperatorSpec | None:
    """The operator type of that name, or None."""
    return _SPECS.get(name)


def all_specs() -> dict[str, OperatorSpec]:
    """Every registered operator type that a pipeline file may name, sorted by name."""
    return {name: spec for name, spec in sorted(_SPECS.items()) if name not in FOR_PROGRAMS}
