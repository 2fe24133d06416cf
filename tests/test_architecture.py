"""The house as docs/architecture.md plans it: the order of rooms, shut doors, the size of a module, the file tree.

Imports are read from the syntax tree, so nothing here depends on what happens to be installed or imported.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lyceum"
ORDER = (
    "floor corpus tokens batches model engine tools safety evals train stages synth compress ancestors serve cli"
).split()
SHUT = {  # room -> rooms it must not import, though the order would let it
    "model": {"batches"},
    "engine": {"batches", "tools", "safety"},
    "train": {"engine", "evals"},
    "serve": {"batches", "train", "stages", "synth", "compress", "ancestors"},
}
NO_TORCH = {"floor", "corpus", "tokens"}  # not at module level, nor through what they import there
HEAVY = {"torch", "transformers", "typer"}
MAX_LINES = 500

Edge = tuple[str, bool]  # (imported module, at module level and at run time)


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def room(module: str) -> str:
    """The room a module stands in; a flat module is of the floor, except the entry of ``python -m lyceum``."""
    parts = module.split(".")
    if module == "lyceum.__main__":
        return "cli"
    inside = len(parts) > 2 or (len(parts) == 2 and (PACKAGE / parts[1]).is_dir())
    return parts[1] if inside else "floor"


@cache
def imports(module: str) -> tuple[Edge, ...]:
    """What a module imports, lazily and for type annotations too."""
    return tuple(_edges(ast.parse(modules()[module].read_text(encoding="utf-8")), True))


def _edges(node: ast.AST, at_start: bool) -> Iterator[Edge]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, at_start) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are written in full"
            names = [f"{child.module}.{alias.name}" for alias in child.names]
            submodules = [name for name in names if name in modules()]
            yield from ((name, at_start) for name in submodules or [child.module or ""])
            if submodules:
                yield child.module or "", at_start
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for part in child.body:
                yield from _edges(ast.Module([part], []), False)
            for part in child.orelse:
                yield from _edges(ast.Module([part], []), at_start)
        else:
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _edges(child, at_start and not inside)


def ours(module: str) -> set[str]:
    """The rooms' modules that `module` imports; a package's own __init__ says nothing about where it stands."""
    return {name for name, _ in imports(module) if name in modules() and name != "lyceum"}


def at_start(module: str) -> set[str]:
    """Every module, ours or not, that is imported when `module` is; packages are imported before their modules."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        parents = [".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 1)]
        if name in modules():
            waiting += [imported for imported, now in imports(name) if now]
        waiting += parents
    return seen


# -------------------------------------------------------------------------------- rooms and doors


def test_every_room_is_in_the_plan() -> None:
    assert {room(module) for module in modules()} <= set(ORDER)
    assert not {"utils", "helpers", "common"} & {part for module in modules() for part in module.split(".")}


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_only_its_own_room_and_those_to_its_left(module: str) -> None:
    here = room(module)
    right = {name for name in ours(module) if ORDER.index(room(name)) > ORDER.index(here)}
    assert not right, f"{module} stands in {here} and must not import {sorted(right)}"


@pytest.mark.parametrize("module", modules())
def test_shut_doors_stay_shut(module: str) -> None:
    shut = SHUT.get(room(module), set())
    through = {name for name in ours(module) if room(name) in shut}
    assert not through, f"{module} must not import {sorted(through)}"


def test_what_the_server_imports_holds_no_training_code() -> None:
    reached: set[str] = set()
    waiting = [module for module in modules() if room(module) == "serve"]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += ours(module)
    assert not {module for module in reached if room(module) in SHUT["serve"]}


@pytest.mark.parametrize("module", [module for module in modules() if room(module) in NO_TORCH])
def test_text_rooms_and_the_floor_start_without_torch(module: str) -> None:
    heavy = {name for name in at_start(module) if name.split(".")[0] in HEAVY}
    assert not heavy, f"importing {module} imports {sorted(heavy)}"


def test_the_command_line_starts_without_torch() -> None:
    assert not {name for name in at_start("lyceum.cli.main") if name.split(".")[0] in HEAVY}
    assert "torch" in at_start("lyceum.model.transformer")  # the control: it is found where it is


def test_importing_every_text_module_really_loads_no_torch() -> None:
    names = [module for module in modules() if room(module) in NO_TORCH]
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, *names], check=True, timeout=60)


# -------------------------------------------------------------------------------- size


@pytest.mark.parametrize("module", modules())
def test_a_module_has_at_most_500_lines_and_says_what_it_is(module: str) -> None:
    text = modules()[module].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert ast.get_docstring(ast.parse(text)), f"{module} has no docstring"


# -------------------------------------------------------------------------------- the tree in the documentation

DOCUMENT = ROOT / "docs" / "architecture.md"
ENTRY = re.compile(r"^(?P<before>[|` ]*)[|`]- (?P<name>\S+)")


def drawn() -> set[str]:
    """The files in the tree of docs/architecture.md: every entry that ends in .py, with the folders above it."""
    block = re.search(r"^```\w*\nlyceum/\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert block is not None, "docs/architecture.md has no tree that begins with lyceum/"
    files, above = set(), {}  # column -> folder drawn there
    for line in block.group(1).splitlines():
        entry = ENTRY.match(line)
        if entry is None:
            continue
        column, name = len(entry["before"]), entry["name"]
        above = {at: folder for at, folder in above.items() if at < column}
        if name.endswith("/"):
            above[column] = name
        elif name.endswith(".py"):
            files.add("".join(folder for _, folder in sorted(above.items())) + name)
    return files


@pytest.mark.skipif(not DOCUMENT.exists(), reason="the plan is not here")
def test_the_file_tree_in_the_documentation_is_the_real_one() -> None:
    real = {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        if file.name not in ("__init__.py", "__main__.py")
    }
    assert drawn() == real
