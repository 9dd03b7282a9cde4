"""The floors: imports point downward only, and what must stay light never loads torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import sageLLM

ROOT = Path(sageLLM.__file__).parent

FLOORS = [
    {"errors", "config", "records", "histogram"},
    {"backends", "accel"},
    {"models", "kv_runtime"},
    {"graph"},
    {"runtime"},
    {"operators"},
    {"generation"},
    {"engine"},
    {"cli", "integrations", "benchmarks"},
]
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}
SIDEWAYS = {("errors", "config"), ("config", "errors"), ("records", "errors"), ("cli", "benchmarks")}
GRAPH_MAY_IMPORT = {"errors", "config", "records", "graph"}
WITHOUT_TORCH = ("errors", "config", "records", "graph", "operators", "runtime.flow", "runtime.scheduler", "cli")
OUTSIDE = {"tests", "examples", "docs", "build", "dist", "out"}


@cache
def package_files() -> tuple[Path, ...]:
    """Every module of the package except its front page, `__init__.py`, which names all floors."""
    tops = [top for top in ROOT.iterdir() if top.name not in OUTSIDE and not top.name.startswith(".")]
    files = [file for top in tops for file in ([top] if top.suffix == ".py" else top.rglob("*.py"))]
    return tuple(sorted(file for file in files if file != ROOT / "__init__.py"))


def module_of(path: Path) -> tuple[str, ...]:
    names = path.relative_to(ROOT).with_suffix("").parts
    return names[:-1] if names[-1] == "__init__" else names


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imports_of(tree: ast.AST, *, functions: bool = True) -> list[ast.Import | ast.ImportFrom]:
    """The imports that are executed; with `functions=False` only those executed when the module is loaded."""
    found: list[ast.Import | ast.ImportFrom] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append(node)
        elif is_type_checking(node):
            found += [i for child in node.orelse for i in imports_of(ast.Module([child], []), functions=functions)]
        elif functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            found += imports_of(node, functions=functions)
    return found


def targets(node: ast.Import | ast.ImportFrom, path: Path) -> list[tuple[str, ...]]:
    """The modules inside the package that a relative import reaches, as paths from the root."""
    if isinstance(node, ast.Import) or node.level == 0:
        return []
    package = path.relative_to(ROOT).parent.parts
    base = package[: len(package) - (node.level - 1)]
    stem = (*base, *(node.module.split(".") if node.module else ()))
    return [(*stem, alias.name) for alias in node.names] if not node.module else [stem]


def test_every_top_level_name_has_a_floor() -> None:
    names = {module_of(path)[0] for path in package_files()}
    assert names - {"pipelines", "__main__"} <= set(FLOOR_OF)


def test_imports_point_downward() -> None:
    for path in package_files():
        here = module_of(path)[0]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in imports_of(tree):
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").split(".")[0] != "sageLLM", f"{where}: write a relative import"
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] != "sageLLM" for alias in node.names), (
                    f"{where}: write a relative import"
                )
            for target in targets(node, path):
                there = target[0]
                if there == here or there not in FLOOR_OF:
                    continue
                allowed = FLOOR_OF[there] < FLOOR_OF[here] or (here, there) in SIDEWAYS
                assert allowed, f"{where}: {here} (floor {FLOOR_OF[here]}) imports {there} (floor {FLOOR_OF[there]})"
                if here == "graph":
                    assert there in GRAPH_MAY_IMPORT, (
                        f"{where}: graph imports only errors, config and records, not {there}"
                    )


def light_files() -> list[Path]:
    names = {path: ".".join(module_of(path)) for path in package_files()}
    return [path for path, module in names.items() if any(f"{module}.".startswith(f"{n}.") for n in WITHOUT_TORCH)]


def test_light_modules_do_not_import_torch_when_loaded() -> None:
    for path in light_files():
        for node in imports_of(ast.parse(path.read_text(encoding="utf-8")), functions=False):
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert all(name.split(".")[0] != "torch" for name in names), f"{where}: import torch where it is used"


def test_loading_all_light_modules_does_not_load_torch() -> None:
    """Also through what they import."""
    modules = [".".join(("sageLLM", *module_of(path))) for path in light_files()]
    assert len(modules) > 10
    code = (
        "import importlib, sys\n"
        f"for module in {modules!r}:\n"
        "    importlib.import_module(module)\n"
        "    assert 'torch' not in sys.modules, module"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_reader_of_imports_sees_through_functions_and_type_checking() -> None:
    tree = ast.parse(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from ..engine import A\nelse:\n    import b\n"
        "def f():\n    from ..cli import c\n"
        "class D:\n    import d\n"
    )
    every = [ast.unparse(node) for node in imports_of(tree)]
    assert every == ["from typing import TYPE_CHECKING", "import b", "from ..cli import c", "import d"]
    assert "from ..cli import c" not in [ast.unparse(node) for node in imports_of(tree, functions=False)]
