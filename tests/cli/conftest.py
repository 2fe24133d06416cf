"""A small river of made-up kinds (soil -> shoot -> tree -> fruit), to test the running without any stage."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lyceum.cli import kinds, river
from lyceum.cli.kinds import Input, Kind
from lyceum.config import setting
from lyceum.run import Work

KINDS = {
    "soil": Kind("dig", "made_up.soil", "Config"),
    "shoot": Kind("sow", "made_up.shoot", "Config", (Input("soil", ("soil",)),), makes_model=True),
    "tree": Kind(
        "grow", "made_up.tree", "Config", (Input("policy", ("shoot", "tree")), Input("soil", ("soil",), False))
    ),
    "fruit": Kind("pick", "made_up.fruit", "Config", (Input("tree", ("tree",)),)),
}

RECIPE = """
name = "garden"

[model]
depth = 2

[soil]
[shoot]
[tree]
size = 2
[tree.graft]
from = "shoot"
[fruit]
"""


@dataclass(frozen=True)
class Config:
    """The settings of every made-up kind."""

    size: int = setting(1, "how big", low=0)


@dataclass
class Garden:
    """The recipe's file, the folder of runs, and what was run, in order."""

    recipe: Path
    runs: Path
    ran: list[str] = field(default_factory=list)
    works: dict[str, Work] = field(default_factory=dict)
    before: Callable[[str], None] = lambda name: None  # called as each section runs

    @property
    def folder(self) -> Path:
        return self.runs / "garden"

    def run(self, *overrides: str, first: str = "", last: str = "") -> list[str]:
        """Run the recipe; returns the sections that really ran."""
        self.ran.clear()
        river.run_recipe(self.recipe, overrides=overrides, first=first, last=last, runs_dir=self.runs)
        return list(self.ran)

    def entry(self, config: Any, work: Work) -> dict[str, Any]:
        """What every made-up section does: leaves a file, and says so."""
        name = work.folder.path.name
        self.before(name)
        self.ran.append(name)
        self.works[name] = work
        (work.folder.path / "made").write_text(json.dumps([config.size, work.seed]))
        return {"line": f"{name} is {config.size} big", "size": config.size}


@pytest.fixture
def garden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Garden]:
    """The made-up river in place of the real one."""
    recipe = tmp_path / "garden.toml"
    recipe.write_text(RECIPE)
    made = Garden(recipe, tmp_path / "runs")
    for kind in KINDS.values():
        module = types.ModuleType(kind.module)
        module.run, module.Config, module.VERSION = made.entry, Config, 1  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, kind.module, module)
    for place in (kinds, river):
        monkeypatch.setattr(place, "KINDS", KINDS)
    yield made
