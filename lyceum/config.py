"""Recipes: one TOML file is one whole assistant; ``--set section.key=value`` changes it for one run.

    name = "demo"            # the run's folder; by default the file's name
    seed = 1
    within = "runs/demo"     # a run whose finished sections stand in for those that this recipe needs and lacks
    rounds = 2               # rankings and what learns from them once more, of the newest policy: rankings-2, reward-2, ppo-2

    [model]                  # the model's shape, read by the stage that makes one
    depth = 4

    [watch]                  # how a run is watched (lyceum/train/watch.py): changes no section
    tensorboard = true

    [machine]               # one model over many ranks (lyceum/train/machine.py): changes no section
    shard = true

    [corpus]                 # a section: its kind, which is also its name and its folder
    objects = 500

    [sft.gentle]             # a second section of a kind: kind and name
    from = "sft"             # where it starts, if not at the nearest fitting section before it
    epochs = 3

Sections run in the order in which their headers stand. Each kind's settings are a frozen dataclass beside the code
they configure, made of `setting(default, help)` fields; `build` fills it, and a key it does not know is an error that
names the nearest one. Precedence: defaults < recipe < --set.

This is not a configuration language: no includes, no variables, no expressions.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lyceum.errors import ConfigError, did_you_mean

Config = TypeVar("Config")

# -------------------------------------------------------------------------------- one section's settings


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[Any] | None = None,
) -> Any:
    """A field of a section's settings.

    Args:
        default: its value when nobody says otherwise; a list is kept as a tuple, a dict is copied.
        help: one sentence for the person who sets it.
        low, high: the least and the greatest value allowed (of a number, or of each number in a list).
        choices: the only values allowed.
    """
    meta = {"help": help, "low": low, "high": high, "choices": tuple(choices) if choices is not None else None}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=meta)
    return dataclasses.field(default=tuple(default) if isinstance(default, list) else default, metadata=meta)


def build(cls: type[Config], table: Mapping[str, Any], where: str) -> Config:
    """Make a settings object of `cls` from a recipe's table.

    Args:
        cls: a frozen dataclass with `setting` fields.
        table: key -> value, as TOML gives them.
        where: the table's name for messages, such as ``[sft] in recipes/demo.toml``.

    Raises:
        ConfigError: an unknown key, a value of a wrong type, or one out of bounds.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in table.items():
        if key not in fields:
            raise ConfigError(f"{where} has no setting {key!r}", hint=did_you_mean(key, fields))
        place = f"{where}: {key}"
        values[key] = _fit(value, hints[key], place)
        _check_bounds(values[key], fields[key].metadata, place)
    return cls(**values)


def settings_of(config: Any) -> dict[str, Any]:
    """A settings object as a plain table: every value, defaults too, tuples as lists."""
    return {field.name: _untuple(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _untuple(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_untuple(item) for item in value]
    return {key: _untuple(item) for key, item in value.items()} if isinstance(value, dict) else value


def _fit(value: Any, wanted: Any, place: str) -> Any:
    """`value` as the type `wanted`, or a ConfigError. Whole numbers pass as floats and lists as tuples, no more."""
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for option in inner:
            try:
                return _fit(value, option, place)
            except ConfigError:
                continue
    elif origin is typing.Literal and value in inner:
        return value
    elif origin in (tuple, list) and isinstance(value, (list, tuple)):
        each = inner[:1] * len(value) if origin is list or inner[1:] == (Ellipsis,) else inner
        if len(each) == len(value):
            return origin(_fit(item, kind, place) for item, kind in zip(value, each, strict=True))
    elif origin is dict and isinstance(value, Mapping):
        return {str(key): _fit(item, inner[1], f"{place}.{key}") for key, item in value.items()}
    elif wanted is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif isinstance(wanted, type) and isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
        return value
    elif wanted is Path and isinstance(value, str):
        return Path(value)
    raise ConfigError(f"{place} is {_show(value)}; expected {_describe(wanted)}", hint="write the value as TOML does")


def _describe(wanted: Any) -> str:
    """A type as a person says it."""
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    words = {int: "a whole number", float: "a number", str: 'a text in "quotes"', bool: "true or false", Path: "a path"}
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in inner if option is not type(None))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, inner))
    if origin in (tuple, list):
        return f"a list, each of it {_describe(inner[0])}" if inner else "a list"
    return "a table { name = value }" if origin is dict or wanted is dict else words.get(wanted, str(wanted))


def _check_bounds(value: Any, meta: Mapping[str, Any], place: str) -> None:
    low, high, choices = meta.get("low"), meta.get("high"), meta.get("choices")
    for item in value if isinstance(value, tuple) else value.values() if isinstance(value, dict) else (value,):
        if choices is not None and item not in choices:
            known = [str(choice) for choice in choices]
            raise ConfigError(
                f"{place} is {_show(item)}; it can be {', '.join(known)}", hint=did_you_mean(str(item), known)
            )
        if isinstance(item, (int, float)) and not isinstance(item, bool):
            if (low is not None and not item >= low) or (high is not None and not item <= high):
                bounds = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
                raise ConfigError(
                    f"{place} is {item}; it must be {' and '.join(bounds)}", hint="choose a value in these bounds"
                )


def _show(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


# -------------------------------------------------------------------------------- the recipe


@dataclass(frozen=True)
class Section:
    """One section of a recipe.

    Args:
        kind: what it does; the stage, the verb.
        name: its folder in the run; the kind, unless the header names another.
        settings: its table as written (overrides in it, defaults not).
        source: the earlier section that ``from = "name"`` asks for; empty for the nearest fitting one.
        repeats, round: of a later round, the section of the first that it is once more, whose start it shares; rankings
            share none, since they are drawn from the newest policy.
    """

    kind: str
    name: str
    settings: dict[str, Any]
    source: str = ""
    repeats: str = ""
    round: int = 1


@dataclass(frozen=True)
class Recipe:
    """One whole assistant: sections in the order in which they run, the model's table, the seed, how it is watched and spread.

    within: a run whose finished sections stand in for those that this recipe needs and lacks.
    """

    name: str
    seed: int
    model: dict[str, Any]
    sections: tuple[Section, ...]
    path: Path
    watch: dict[str, Any] = dataclasses.field(default_factory=dict)
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)
    within: str = ""

    def section(self, name: str) -> Section | None:
        """The section of that name."""
        return next((section for section in self.sections if section.name == name), None)


def find_recipe(given: str | Path) -> Path:
    """The file of a recipe that is given by path or, for a packaged one, by name.

    Raises:
        ConfigError: there is none; the hint names the nearest.
    """
    path = Path(given)
    if path.is_file():
        return path
    known = {file.stem: file for folder in _recipe_folders() for file in sorted(folder.glob("*.toml"))}
    if str(path.parent) in (".", "recipes") and path.stem in known and path.suffix in ("", ".toml"):
        return known[path.stem]
    raise ConfigError(
        f"there is no recipe {given}", hint=did_you_mean(path.stem, known) or "give the path of a .toml file"
    )


def _recipe_folders() -> list[Path]:
    """Where recipes come with the package: inside it when installed, beside it in a checkout."""
    package = Path(__file__).parent
    return [folder for folder in (package.parent / "recipes", package / "recipes") if folder.is_dir()]


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply overrides.

    Args:
        path: a TOML file.
        overrides: ``section.key=value``, ``model.key=value``, ``seed=1`` or ``name="other"``, each value as in TOML;
            a bare word counts as text, since shells eat quotes. A section's holds in all its rounds, ``ppo-2.key=value`` in one.

    Raises:
        ConfigError: no such file, broken TOML (with its line), a misplaced key, an override that names nothing.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(
            f"there is no recipe {path}", hint="give the path of a .toml file, or the name of one in recipes/"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"cannot read the recipe {path}: {error.strerror}", hint="give the path of a .toml file"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is not valid TOML: {error}", hint="mend that line; https://toml.io shows the syntax"
        ) from None
    headers = _headers(text, tables, path)
    of_one_round = [override for override in overrides if _names_a_later_round(override, headers)]
    _apply([override for override in overrides if override not in of_one_round], tables, headers)
    for key, value in tables.items():
        if key not in WHOLE and not isinstance(value, dict):
            raise ConfigError(f"{path} has no top-level setting {key!r}", hint=did_you_mean(key, WHOLE))
    name = _fit(tables.get("name", path.stem), str, f"{path}: name")
    if not re.fullmatch(r"[\w][\w.+-]*", name):
        raise ConfigError(
            f"{path}: name is {name!r}", hint="the name becomes a folder: letters, digits, '-', '_' and '.'"
        )
    rounds = _fit(tables.get("rounds", 1), int, f"{path}: rounds")
    _check_bounds(rounds, {"low": 1}, f"{path}: rounds")
    sections = _in_rounds(tuple(_sections(tables, headers, path)), rounds, path)
    _apply(of_one_round, {s.name: s.settings for s in sections}, [(s.name,) for s in sections])
    return Recipe(
        name=name,
        seed=_fit(tables.get("seed", 0), int, f"{path}: seed"),
        model=dict(tables.get("model", {})),
        sections=tuple(_with_source(section, path) for section in sections),
        path=path,
        watch=dict(tables.get("watch", {})),
        machine=dict(tables.get("machine", {})),
        within=_fit(tables.get("within", ""), str, f"{path}: within"),
    )


WHOLE = ("name", "seed", "within", "rounds")  # settings of the whole recipe
TABLES = ("model", "watch", "machine")  # headers that make no section
# The kinds that `rounds` repeats, with what they do in a later round unless the recipe says otherwise.
ROUND: dict[str, dict[str, Any]] = {
    "rankings": {"cumulative": True}, "reward": {}, "preference": {}, "ppo": {}, "tamer": {}, "grpo": {}
}  # fmt: skip
HEADER = re.compile(r"^\s*\[\s*([\w-]+)\s*(?:\.\s*([\w-]+)\s*)?\]", re.MULTILINE)


def _headers(text: str, tables: Mapping[str, Any], path: Path) -> list[tuple[str, ...]]:
    """The table headers in order, as (kind,) or (kind, name): a header makes a section, an inline table a value."""
    found: list[tuple[str, ...]] = []
    for match in HEADER.finditer(text):
        header = tuple(part for part in match.groups() if part)
        inside: Any = tables
        for part in header:  # a line in a multi-line text may look like a header; then the tables do not have it
            inside = inside.get(part) if isinstance(inside, Mapping) else None
        if isinstance(inside, Mapping) and header not in found:
            found.append(header)
    unseen = {key for key, value in tables.items() if isinstance(value, Mapping)} - {header[0] for header in found}
    if unseen:
        raise ConfigError(
            f"{path}: {sorted(unseen)[0]} is no section header", hint="write a section as [kind] or [kind.name]"
        )
    return found


def _sections(tables: Mapping[str, Any], headers: list[tuple[str, ...]], path: Path) -> Iterable[Section]:
    names: set[str] = set()
    for header in headers:
        if header[0] in TABLES:
            continue
        table = dict(tables[header[0]])
        if len(header) == 1:
            for other in headers:
                if len(other) == 2 and other[0] == header[0]:
                    table.pop(other[1])
        else:
            table = dict(table[header[1]])
        section = Section(
            header[0], header[-1], table, _fit(table.pop("from", ""), str, f"{path}: [{'.'.join(header)}] from")
        )
        if section.name in names:
            raise ConfigError(
                f"{path} has two sections of the name {section.name!r}", hint="name the second [kind.name]"
            )
        names.add(section.name)
        yield section


def _in_rounds(sections: tuple[Section, ...], rounds: int, path: Path) -> tuple[Section, ...]:
    """The sections with rankings, and what learns from them, once more for each round after the first, behind it."""
    if rounds == 1:
        return sections
    first = [section for section in sections if section.kind in ROUND]
    kinds = {section.kind for section in first}
    if "rankings" not in kinds or not kinds & {"preference", "ppo", "tamer", "grpo"}:
        raise ConfigError(
            f"{path} has rounds = {rounds}, and lacks what a round is made of: rankings, and a policy that learns from them",
            hint="add [rankings], [reward] and [ppo], or leave rounds out",
        )
    later = []
    for number in range(2, rounds + 1):
        names = {section.name: f"{section.name}-{number}" for section in first}
        for section in first:
            settings = {**ROUND[section.kind], **copy.deepcopy(section.settings)}
            is_drawn = section.kind == "rankings"  # of the newest policy, wherever the first round drew them
            source = "" if is_drawn else names.get(section.source, section.source)
            repeats = "" if is_drawn else section.name
            later.append(Section(section.kind, names[section.name], settings, source, repeats, number))
    taken = {section.name for section in sections} & {section.name for section in later}
    if taken:
        raise ConfigError(
            f"{path} has a section {min(taken)!r}, which is what rounds = {rounds} calls one of its own",
            hint="give it another name",
        )
    at = sections.index(first[-1]) + 1
    return (*sections[:at], *later, *sections[at:])


def _names_a_later_round(override: str, headers: list[tuple[str, ...]]) -> bool:
    """Whether it is ``name-2.key=value``, where the recipe has a section ``name`` and none ``name-2``."""
    names = {header[-1] for header in headers}
    name = override.partition("=")[0].partition(".")[0].strip()
    return name not in names and name.rpartition("-")[0] in names and name.rpartition("-")[2].isdigit()


def _with_source(section: Section, path: Path) -> Section:
    """The section, started from what an override of its round asks for."""
    if "from" not in section.settings:
        return section
    return dataclasses.replace(section, source=_fit(section.settings.pop("from"), str, f"{path}: {section.name} from"))


def _apply(overrides: Sequence[str], tables: dict[str, Any], headers: list[tuple[str, ...]]) -> None:
    """Write each ``key=value`` into the tables."""
    by_name = {header[-1]: header for header in headers}
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = [part.strip() for part in key.split(".")]
        if not equals or not all(parts):
            raise ConfigError(f"--set {override} is no assignment", hint="write --set section.key=value")
        if len(parts) == 1 and parts[0] not in WHOLE:
            hint = f"write --set {parts[0]}.key=value" if parts[0] in by_name else did_you_mean(parts[0], WHOLE)
            raise ConfigError(f"--set {override}: the recipe has no top-level setting {parts[0]!r}", hint=hint)
        inside: Any = tables
        if len(parts) > 1:
            whole = tuple(parts[:2]) in headers  # kind.name.key, else name.key
            header = tuple(parts[:2]) if whole else parts[:1] if parts[0] in TABLES else by_name.get(parts[0])
            if header is None:
                raise ConfigError(
                    f"--set {override}: the recipe has no section {parts[0]!r}", hint=did_you_mean(parts[0], by_name)
                )
            parts = list(header) + parts[len(header) if whole else 1 :]
        for part in parts[:-1]:
            inside = inside.setdefault(part, {})
            if not isinstance(inside, dict):
                raise ConfigError(
                    f"--set {override}: {part} is a value, not a table", hint="write --set section.key=value"
                )
        inside[parts[-1]] = read_value(text)


def read_value(text: str) -> Any:
    """The value that `text` stands for: TOML, or what a shell leaves of it without quotes: ``docs/``, ``[numpy]``."""
    text = text.strip()
    try:
        return tomllib.loads(f"value = {text}\n")["value"]
    except tomllib.TOMLDecodeError:
        if text.startswith("[") and text.endswith("]"):
            return [read_value(item) for item in text[1:-1].split(",") if item.strip()]
        return text


# -------------------------------------------------------------------------------- writing TOML


def to_toml(tables: Mapping[str, Any]) -> str:
    """Tables of plain values as TOML text; a None is left out, since TOML has none."""
    scalars = [f"{_key(key)} = {_toml(value)}" for key, value in tables.items() if not isinstance(value, Mapping)]
    blocks = ["\n".join(scalars)] if scalars else []
    for header, table in tables.items():
        if isinstance(table, Mapping):
            lines = [f"{_key(key)} = {_toml(value)}" for key, value in table.items() if value is not None]
            blocks.append("\n".join([f"[{header}]", *lines]))
    return "\n\n".join(blocks) + "\n"


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _quoted(key)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # the one character only TOML forbids


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(str(key))} = {_toml(item)}" for key, item in value.items()) + " }"
    return _quoted(str(value))
