"""The documentation is held to the code: paths, pointers, commands, settings and their defaults, measures, languages.

Pages are read as text; pointers (`lyceum/tokens/chat.py:ChatFormat.render`) are looked up in the syntax tree, and commands
go through the command line's own parser and the river's plan. Nothing is run. What this cannot hold is prose.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lyceum.cli import river
from lyceum.cli.kinds import KINDS
from lyceum.cli.main import make_parser
from lyceum.config import find_recipe, load_recipe

ROOT = Path(__file__).resolve().parent.parent
READMES = (ROOT / "README.md", ROOT / "README.zh.md")
PAGES = (*READMES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
TOP = ("lyceum", "recipes", "tests", "docs", "dev", "bench")
HERE = ("Makefile", "constraints.txt", "LICENSE", "pyproject.toml")


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def spans(page: Path) -> list[str]:
    """What stands in `backticks`, outside fenced blocks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


# -------------------------------------------------------------------------------- paths and pointers


@cache
def names_in(file: Path) -> frozenset[str]:
    """What a module defines: functions, classes with their methods and fields, values; as `Class.method`."""

    def walk(nodes: list[ast.stmt], before: str) -> Iterator[str]:
        for node in nodes:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield before + node.name
                if isinstance(node, ast.ClassDef):
                    yield from walk(node.body, f"{before}{node.name}.")
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                yield from (before + target.id for target in targets if isinstance(target, ast.Name))

    return frozenset(walk(ast.parse(file.read_text(encoding="utf-8")).body, ""))


def is_there(pointer: str, root: Path = ROOT) -> bool:
    """Whether a path, `path.py:name`, or dotted `lyceum.module.name` is in the repository."""
    path, _, name = pointer.partition(":")
    if path.startswith("lyceum.") and not (root / path).exists():
        parts = path.split(".")
        module, rest = next(
            ((root.joinpath(*parts[:n]), parts[n:]) for n in range(len(parts), 0, -1) if _module(root, parts[:n])),
            (root, parts),
        )
        file = module.with_suffix(".py")
        name = ".".join(rest) or name
        return module != root and (not name or (file.is_file() and name in names_in(file)))
    found = root / path
    if not found.exists():
        return False
    return not name or (found.suffix == ".py" and name in names_in(found))


def _module(root: Path, parts: list[str]) -> bool:
    place = root.joinpath(*parts)
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def pointers(page: Path) -> list[str]:
    """The spans of a page that name a file, a folder or a module of the repository."""
    found = []
    for span in spans(page):
        if not re.fullmatch(r"[\w./-]+(:[\w.]+)?", span):
            continue
        path = span.partition(":")[0]
        if (path.split("/")[0] in TOP and "/" in path) or path in HERE or path.endswith((".py", ".md")):
            found.append(span)
        elif re.fullmatch(r"lyceum(\.\w+)+", path) and path != "lyceum.json":
            found.append(span)
    return found


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_path_and_pointer_of_a_page_is_there(page: Path) -> None:
    missing = [pointer for pointer in pointers(page) if not is_there(pointer)]
    assert not missing, f"{page_name(page)} names {missing}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_link_between_pages_leads_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)\)", prose(page))
    missing = [to for to in targets if "://" not in to and not (page.parent / to).exists()]
    assert not missing, f"{page_name(page)} links to {missing}"


def test_a_wrong_pointer_is_found() -> None:  # the control
    assert is_there("lyceum/tokens/chat.py:ChatFormat.render") and is_there("lyceum.tokens.chat.ChatFormat")
    assert not is_there("lyceum/tokens/chat.py:ChatFormat.rendered")
    assert not is_there("lyceum/tokens/chatter.py") and not is_there("lyceum.tokens.chat.Chat")
    assert pointers(ROOT / "docs" / "index.md")


# -------------------------------------------------------------------------------- commands


def commands(page: Path) -> list[str]:
    """The command lines of a page: those of its ```sh blocks, and spans of more than one word that begin like one."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()] + spans(page)
    words = (shlex.split(line, comments=True) for line in lines if line.startswith(("lyceum ", "make ")))
    return [shlex.join(line) for line in words]


LYCEUM = sorted({(page_name(p), c) for p in PAGES for c in commands(p) if c.startswith("lyceum ")})
MAKE = sorted({(page_name(p), c) for p in PAGES for c in commands(p) if c.startswith("make ")})


VERBS = (
    "run",
    "plan",
    "chat",
    "serve",
    "runs",
    "models",
    "export",
    "feedback",
    "improve",
    "arena",
    "keys",
    "lab",
    *KINDS,
)


@pytest.mark.parametrize(("page", "command"), LYCEUM)
def test_a_command_of_a_page_is_one(page: str, command: str) -> None:
    words = shlex.split(command)[1:]
    if words[1:] in ([], ["--help"]):  # a verb, by its name
        assert words[0] in VERBS or words == ["--help"]
        return
    args = make_parser().parse_args(words)
    recipe = getattr(args, "recipe", "RECIPE")
    if recipe != "RECIPE":  # then its settings must exist too, and its sections be there
        steps = river.plan(load_recipe(find_recipe(recipe), args.overrides))
        assert river.choose(steps, args.first, args.last)


@pytest.mark.parametrize(("page", "command"), MAKE)
def test_a_make_target_of_a_page_is_one(page: str, command: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {name for line in re.findall(r"^([\w -]+):(?!=)", makefile, re.MULTILINE) for name in line.split()}
    assert set(command.split()[1:]) <= targets


def test_both_readmes_show_the_same_commands_and_links() -> None:
    english, chinese = ([*commands(page)] for page in READMES)
    assert english == chinese and len(english) > 10
    english, chinese = (sorted(re.findall(r"\]\(([^)]+)\)", prose(page))) for page in READMES)
    assert [to for to in english if "README" not in to] == [to for to in chinese if "README" not in to]
    headings = {prose(page).count("\n## ") for page in READMES}
    assert len(headings) == 1


def test_the_readmes_name_every_verb_and_the_pinned_versions() -> None:
    pinned = dict(
        re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    )
    for readme in READMES:
        text = readme.read_text(encoding="utf-8")
        assert all(f"`{verb}`" in text or f"`lyceum {verb}`" in text for verb in VERBS)
        named = re.findall(r"`([\w-]+)==([\w.]+)`", text)
        assert named and all(pinned[package] == version for package, version in named)


# -------------------------------------------------------------------------------- stages and their settings


def settings_tables(page: Path) -> Iterator[tuple[str, Any]]:
    """(setting, default) of every row of tables headed `setting`, in the order in which they stand."""
    for table in re.findall(
        r"^\| setting \|.*\n\|[-| ]+\n((?:\|.*\n)+)", page.read_text(encoding="utf-8"), re.MULTILINE
    ):
        for row in table.splitlines():
            first, second = (cell.strip() for cell in row.split(" | ")[:2])
            names = re.findall(r"`(\w+)`", first)
            values = as_values(second.replace("`", ""))
            assert len(names) == len(values), f"{page_name(page)}: {row}"
            yield from zip(names, values, strict=True)


def as_values(cell: str) -> list[Any]:
    """The values in a cell, written as in TOML and separated by commas; a bare word is a text."""
    try:
        return tomllib.loads(f"value = [{cell}]")["value"]
    except tomllib.TOMLDecodeError:
        return [cell]


def defaults(config: type) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(config):
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        found[field.name] = list(value) if isinstance(value, tuple) else value
    return found


def config_of(kind: str) -> type:
    return getattr(importlib.import_module(KINDS[kind].module), KINDS[kind].config)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_section_has_its_page(kind: str) -> None:
    text = (ROOT / "docs" / "stages" / f"{kind}.md").read_text(encoding="utf-8")
    assert KINDS[kind].module.replace(".", "/") + ".py" in text
    assert f"`lyceum {kind} RECIPE`" in text and f"`[{kind}]`" in text
    assert f"stages/{kind}.md" in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_the_settings_on_a_page_are_those_of_the_code(kind: str) -> None:
    from lyceum.train.stage import TrainConfig

    config = config_of(kind)
    others = [
        other for name in KINDS if (other := config_of(name)) in config.__mro__[1:]
    ]  # which have a page of their own
    real, shared = (
        defaults(config),
        {name: value for one in (TrainConfig, *others) for name, value in defaults(one).items()},
    )
    written = dict(settings_tables(ROOT / "docs" / "stages" / f"{kind}.md"))
    wrong = {
        name: (value, real.get(name, "no such setting")) for name, value in written.items() if real.get(name) != value
    }
    assert not wrong, f"docs/stages/{kind}.md says: (written, real) {wrong}"
    own = set(real) - set(shared)
    assert own <= set(written), f"docs/stages/{kind}.md lacks {sorted(own - set(written))}"


def test_the_shared_settings_and_the_models_are_those_of_the_code() -> None:
    from lyceum.model.spec import ModelConfig
    from lyceum.train.machine import MachineConfig
    from lyceum.train.stage import TrainConfig
    from lyceum.train.watch import WatchConfig

    real = {
        name: value
        for c in (TrainConfig, ModelConfig, WatchConfig, MachineConfig)
        for name, value in defaults(c).items()
    }
    assert dict(settings_tables(ROOT / "docs" / "architecture.md")) == real


def test_tables_of_settings_are_read_as_they_are_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    rows = [
        "| setting | default | meaning |",
        "|---|---|---|",
        "| `lr`, `betas` | 0.5, [1, 2] | x |",
        "| `shape` | linear | y |",
    ]
    page.write_text("\n".join(rows) + "\n")
    assert list(settings_tables(page)) == [("lr", 0.5), ("betas", [1, 2]), ("shape", "linear")]


def test_the_measures_on_the_page_of_eval_are_those_of_the_table() -> None:
    from lyceum.evals.tutor_table import MEASURES

    text = (ROOT / "docs" / "stages" / "eval.md").read_text(encoding="utf-8")
    table = text[text.index("| measure |") : text.index("## Settings")]
    rows = [row.split(" | ")[0] for row in table.splitlines() if row.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == {*MEASURES, "kl"}


# -------------------------------------------------------------------------------- words, and what must not be there


def test_the_glossary_is_in_order() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    words = re.findall(r"^\| ([a-z][\w ,-]*) \|", text, re.MULTILINE)[1:]  # the first is the heading
    assert len(words) > 30 and words == sorted(words)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_a_page_names_no_place_of_one_machine(page: Path) -> None:
    assert not re.search(r"(?<![\w.])/(?:home|work|root|Users|tmp)/", page.read_text(encoding="utf-8"))
