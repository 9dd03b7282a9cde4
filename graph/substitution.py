"""`${name}` and `${NAME:default}` in the values of a pipeline."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import yaml

from ..config.wording import nearest
from .document import KeyPath, parse_value

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .problems import Problems

_REFERENCE = re.compile(r"\$\$\{|\$\{(?P<body>[^{}]*)\}|\$\{")
_BODY = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?P<default>:.*)?", re.DOTALL)


def resolve_references(data: dict[str, Any], environment: Mapping[str, str], problems: Problems) -> dict[str, Any]:
    """A copy of a pipeline's values with every reference replaced.

    `${name}` is the var of that name, else the environment variable. `${NAME:default}` falls back to its default.
    A string that is nothing but one reference takes the value with its YAML type; `$${` stands for a plain `${`.
    """
    resolver = _Resolver(data.get("vars"), environment, problems)
    resolved: dict[str, Any] = {}
    for key, value in data.items():
        if key == "vars" and isinstance(value, dict):
            resolved[key] = {name: resolver.variable(name) for name in value}
        else:
            resolved[key] = resolver.replace(value, (key,))
    return resolved


class _Resolver:
    def __init__(self, variables: Any, environment: Mapping[str, str], problems: Problems) -> None:
        self.variables: dict[str, Any] = variables if isinstance(variables, dict) else {}
        self.environment = environment
        self.problems = problems
        self._resolved: dict[str, Any] = {}
        self._open: list[str] = []
        self._broken: set[str] = set()

    def variable(self, name: str) -> Any:
        if name not in self._resolved:
            if name in self._open:
                loop = " -> ".join([*self._open[self._open.index(name) :], name])
                self.problems.add(("vars", name), f"vars refer to each other in a circle, {loop}; give one a value")
                self._broken.add(name)
                return None
            self._open.append(name)
            self._resolved[name] = self.replace(self.variables[name], ("vars", name))
            self._open.pop()
        return self._resolved[name]

    def replace(self, value: Any, path: KeyPath) -> Any:
        if isinstance(value, dict):
            return {key: self.replace(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self.replace(item, (*path, index)) for index, item in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        whole = _REFERENCE.fullmatch(value)
        if whole and whole["body"] is not None:
            return self._look_up(whole, path)

        def text(match: re.Match[str]) -> str:
            if match[0] == "$${":
                return "${"
            found = self._look_up(match, path)
            if found is None or isinstance(found, bool):
                return {None: "", True: "true", False: "false"}[found]
            return str(found)

        return _REFERENCE.sub(text, value)

    def _look_up(self, match: re.Match[str], path: KeyPath) -> Any:
        body = None if match["body"] is None else _BODY.fullmatch(match["body"])
        if body is None:
            self.problems.add(
                path,
                f"found {match.string[match.start() :]!r}; write ${{name}}, ${{NAME:default}}, or $${{ for a plain ${{",
                offset=match.start(),
            )
            self._break(path)
            return None
        name, default = body["name"], body["default"]
        if name in self.variables:
            value = self.variable(name)
            if name in self._broken:
                self._break(path)
            return value
        if name in self.environment:
            return _typed(self.environment[name])
        if default is not None:
            return _typed(default[1:])
        near = nearest(name, self.variables)
        advice = f"did you mean ${{{near}}}?" if near else f"add it under vars, or write ${{{name}:default}}"
        self.problems.add(
            path,
            f"{match[0]} is neither a var nor set in the environment; {advice}",
            offset=match.start(),
        )
        self._break(path)
        return None

    def _break(self, path: KeyPath) -> None:
        """Nothing more is to be said of a value whose reference is unresolved, nor of what refers to it."""
        self.problems.ignore(path)
        if path[0] == "vars":
            self._broken.add(str(path[1]))


def _typed(text: str) -> Any:
    """The scalar that YAML reads in a text; what is no scalar stays text."""
    try:
        value = parse_value(text) if text else text
    except yaml.YAMLError:
        return text
    return text if isinstance(value, (dict, list)) else value
