"""Operator types by name: those of the package, those of installed plug-ins, those of modules the user allowed."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import ConfigError, SageLLMError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from .operator_spec import OperatorSpec

ENTRY_POINT_GROUP = "sagellm.operators"
FOR_PROGRAMS = frozenset({"call_source"})  # where SageLLMEngine's requests come in: files hang with it

_SPECS: dict[str, OperatorSpec | str] = {}  # or the module that registers it, which has not been imported


def declare(modules: Mapping[str, str]) -> None:
    """Say which module registers an operator type of which name: it is imported when somebody asks for the type."""
    for name, module in modules.items():
        _SPECS.setdefault(name, module)


def register(spec: OperatorSpec) -> None:
    """Add an operator type.

    Raises:
        ConfigError: the name is taken by another class.
    """
    known, owner, is_taken = _SPECS.get(spec.name), "", False
    if isinstance(known, str):
        owner, is_taken = known, known != spec.factory.__module__
    elif known is not None:
        owner, is_taken = known.factory.__module__, known.factory.__qualname__ != spec.factory.__qualname__
    if is_taken:
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
    """The operator type of that name, or None. Its module is imported if it has only been declared."""
    known = _SPECS.get(name)
    if isinstance(known, str):
        import_module(known)
        known = _SPECS[name]
        assert not isinstance(known, str), f"{known} registers no operator {name!r}"
    return known


def all_specs() -> dict[str, OperatorSpec]:
    """Every operator type that a pipeline file may name, sorted by name. Imports all that have only been declared."""
    specs = {name: find_spec(name) for name in sorted(_SPECS)}
    return {name: spec for name, spec in specs.items() if spec is not None and name not in FOR_PROGRAMS}
