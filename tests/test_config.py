"""Recipes and settings: precedence, types, bounds, and what each mistake is answered with."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lyceum import config
from lyceum.config import Recipe, build, load_recipe, read_value, setting, settings_of, to_toml
from lyceum.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """One field of each type that recipes have."""

    epochs: int = setting(2, "passes over the data", low=1, high=100)
    lr: float = setting(1e-3, "learning rate", low=0.0)
    decay: str = setting("linear", "shape of the decay", choices=("linear", "cosine"))
    packages: tuple[str, ...] = setting(["json"], "what to read")
    betas: tuple[float, float] = setting((0.9, 0.95), "AdamW's two")
    weights: dict[str, float] = setting({"docs": 0.5}, "share of each part", low=0.0)
    shuffle: bool = setting(True, "in a random order")
    folder: str | None = setting(None, "a folder to read")
    mode: Literal["fast", "exact"] = setting("fast", "how")
    where: Path = setting(Path("x"), "a path")


RECIPE = """
name = "small"
seed = 7

[model]
depth = 4

[watch]
spike = 8

[corpus]
objects = 500
text = '''
[nothing]
'''

[sft]          # a comment
lr = 1
weights = { docs = 1 }

[ppo]

[sft.gentle]
from = "ppo"
lr = 2
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "demo.toml"
    path.write_text(RECIPE)
    return path


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    return path


# -------------------------------------------------------------------------------- settings


def test_what_is_not_said_has_its_default() -> None:
    assert build(Settings, {}, "[sft]") == Settings()
    assert Settings().packages == ("json",)


def test_whole_numbers_become_floats_and_lists_tuples() -> None:
    made = build(Settings, {"lr": 1, "betas": [0, 1], "weights": {"code": 1}, "folder": "a", "where": "b"}, "[sft]")
    assert (made.lr, made.betas, made.weights) == (1.0, (0.0, 1.0), {"code": 1.0})
    assert type(made.lr) is type(made.betas[0]) is type(made.weights["code"]) is float
    assert (made.folder, made.where) == ("a", Path("b"))


def test_the_watch_table_is_no_section_and_can_be_set(file: Path) -> None:
    recipe = load_recipe(file, ["watch.spike=6", "watch.wandb=my project"])
    assert recipe.watch == {"spike": 6, "wandb": "my project"}
    assert recipe.section("watch") is None and load_recipe(file).watch == {"spike": 8}


def test_the_default_table_is_not_shared() -> None:
    assert Settings().weights is not Settings().weights


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"epoch": 3}, ["[sft] has no setting 'epoch'", "did you mean 'epochs'?"]),
        ({"epochs": 1.5}, ["[sft]: epochs is 1.5", "a whole number"]),
        ({"epochs": True}, ["a whole number"]),
        ({"lr": True}, ["a number"]),
        ({"lr": "high"}, ['lr is "high"', "a number"]),
        ({"epochs": 0}, ["epochs is 0", "at least 1"]),
        ({"epochs": 101}, ["at most 100"]),
        ({"lr": float("nan")}, ["at least 0"]),
        ({"decay": "cosin"}, ["linear, cosine", "did you mean 'cosine'?"]),
        ({"packages": "json"}, ["a list"]),
        ({"packages": [1]}, ["packages"]),
        ({"betas": [0.9]}, ["betas"]),
        ({"weights": {"docs": -1}}, ["weights is -1.0", "at least 0"]),
        ({"shuffle": 1}, ["true or false"]),
        ({"folder": 3}, ["folder is 3", "a text"]),
        ({"mode": "slow"}, ["'fast', 'exact'"]),
    ],
)
def test_a_wrong_setting_is_named_with_what_was_expected(table: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Settings, table, "[sft]")
    for word in words:
        assert word in str(caught.value)


# -------------------------------------------------------------------------------- recipes


def test_a_recipe_has_its_sections_in_the_order_of_their_headers(file: Path) -> None:
    recipe = load_recipe(file)
    assert (recipe.name, recipe.seed, recipe.model) == ("small", 7, {"depth": 4})
    assert [(s.kind, s.name, s.source) for s in recipe.sections] == [
        ("corpus", "corpus", ""),
        ("sft", "sft", ""),
        ("ppo", "ppo", ""),
        ("sft", "gentle", "ppo"),
    ]
    assert recipe.section("sft").settings == {"lr": 1, "weights": {"docs": 1}}  # type: ignore[union-attr]
    assert recipe.section("gentle").settings == {"lr": 2}  # type: ignore[union-attr]


def test_the_name_is_the_files_unless_given(tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path, "[corpus]\n")).name == "bad"


def test_set_wins_over_the_recipe(file: Path) -> None:
    recipe = load_recipe(
        file,
        [
            "sft.lr=3e-4",
            "sft.gentle.epochs=4",
            "gentle.decay=cosine",
            "sft.weights.code=0.5",
            "model.depth=2",
            "model.width=64",
            "seed=8",
            'name="other"',
            'corpus.packages=["numpy"]',
            "ppo.from=gentle",
        ],
    )
    assert (recipe.name, recipe.seed, recipe.model) == ("other", 8, {"depth": 2, "width": 64})
    settings = {section.name: section.settings for section in recipe.sections}
    assert settings["sft"] == {"lr": 3e-4, "weights": {"docs": 1, "code": 0.5}}
    assert settings["gentle"] == {"lr": 2, "epochs": 4, "decay": "cosine"}
    assert settings["corpus"]["packages"] == ["numpy"]
    assert recipe.section("ppo").source == "gentle"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 0.001),
        ("true", True),
        ('"a b"', "a b"),
        ("docs/", "docs/"),
        ("[numpy, json]", ["numpy", "json"]),
        ("[1,2]", [1, 2]),
        ("[]", []),
        ("{docs = 0.5}", {"docs": 0.5}),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_a_value_is_read_as_toml_or_as_the_shell_leaves_it(text: str, value: Any) -> None:
    assert read_value(text) == value


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sft.epochs", ["--set section.key=value"]),
        ("stf.epochs=1", ["no section 'stf'", "did you mean 'sft'?"]),
        ("sed=1", ["no top-level setting 'sed'", "did you mean 'seed'?"]),
        ("sft=1", ["--set sft.key=value"]),
        ("sft.lr.x=1", ["lr is a value, not a table"]),
        ("seed=soon", ["seed", "a whole number"]),
        ("name=a/b", ["name is 'a/b'", "folder"]),
    ],
)
def test_a_wrong_override_is_answered_with_what_would_be_right(file: Path, override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(file, [override])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[corpus]\nobjects = \n", ["bad.toml", "line 2"]),
        ("sead = 1\n", ["no top-level setting 'sead'", "did you mean 'seed'?"]),
        ("name = 3\n", ["name is 3", "a text"]),
        ("seed = 1.5\n", ["seed is 1.5"]),
        ("[sft]\n[sft.sft]\n", ["two sections of the name 'sft'"]),
        ("corpus = { a = 1 }\n", ["corpus is no section header"]),
        ("[sft]\nfrom = 3\n", ["[sft] from is 3"]),
    ],
)
def test_a_broken_recipe_names_file_and_place(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(written(tmp_path, text))
    for word in words:
        assert word in str(caught.value)


def test_a_missing_recipe_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no recipe"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot read"):
        load_recipe(tmp_path)


# -------------------------------------------------------------------------------- writing TOML

keys = st.text(min_size=1, max_size=8)
values = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(keys, values, max_size=4))
def test_what_is_written_as_toml_is_read_back_the_same(table: dict[str, Any]) -> None:
    text = to_toml({"name": "x", "sft": table})
    assert tomllib.loads(text) == {"name": "x", "sft": table}


def test_settings_survive_the_resolved_recipe(tmp_path: Path) -> None:
    made = build(Settings, {"epochs": 5, "packages": ["a", "b"], "weights": {"code": 0.25}}, "[sft]")
    path = written(tmp_path, to_toml({"seed": 3, "sft": settings_of(made) | {"where": "x"}}))
    recipe: Recipe = load_recipe(path)
    assert build(Settings, recipe.sections[0].settings, "[sft]") == made


def test_a_packaged_recipe_is_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_recipe_folders", lambda: [tmp_path / "recipes"])
    (tmp_path / "recipes").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    demo = tmp_path / "recipes" / "demo.toml"
    demo.write_text("")
    for word in ("demo", "demo.toml", "recipes/demo.toml", demo):
        assert config.find_recipe(word) == demo
    for word in ("demi", "elsewhere/demo.toml", "recipes/demi.toml"):
        with pytest.raises(ConfigError, match="there is no recipe") as caught:
            config.find_recipe(word)
        assert "demo" in caught.value.hint
