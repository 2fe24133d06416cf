"""``lyceum improve runs/demo``: what people said about a run's answers, learned from; the next model, compared and offered.

    lyceum improve runs/demo                          rankings straight into the policy (DPO)
    lyceum improve runs/demo --method ppo             a reward model of them, and PPO against it
    lyceum improve runs/demo --set preference.lr=1e-4
    lyceum improve runs/demo --again                  though nothing new was said since the last time

An improvement is a run of its own within the run, `improve/1`, `improve/2`, ..., made by the river from a recipe that is
written here: judgements, preference (or reward and ppo), compare. So it has keys, goes on after a kill, and has a page, as any
run does. It starts from the model that is served, which the improvement before it may have made, and learns from all
feedback so far. Settings are those of the run's own recipe where it has such a section, else `DEFAULTS`.

`improve.json` in its folder, written last, closes it; the same command then begins the next, if something new was said by then:
else it shows what the last one came to, and offers that where it is asked to. The run's `offer.json` names the
checkpoint to be served (`lyceum.run.Offer`): a running server takes it up within seconds, `lyceum serve` and `lyceum chat`
when they start. It is written only if the comparison found the new model to be better (`lyceum.evals.compare` has the
rule), or as ``--offer`` says.

What it is not: a judge of the people who judged.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lyceum.cli import river
from lyceum.cli.chat import find_checkpoint
from lyceum.cli.judgements import JudgementsConfig, gather
from lyceum.config import Recipe, load_recipe, to_toml
from lyceum.corpus.rows import json_line
from lyceum.errors import RunError, UsageError, did_you_mean
from lyceum.run import OFFER, Offer, Run, read_manifest, read_offer, write_json, write_text

ROUNDS = "improve"  # the folder of all improvements of a run
CLOSED = "improve.json"  # of one of them: what came of it; only a closed one has it
METHODS: Mapping[str, tuple[str, ...]] = {"dpo": ("preference",), "ppo": ("reward", "ppo")}
OFFERS = ("better", "always", "never")
DEFAULTS: Mapping[str, Mapping[str, Any]] = {  # for some hundreds of rankings and a few million weights
    "preference": {"epochs": 8, "nll": 0.1, "lr": 1e-3},
    "reward": {"epochs": 2},
    "ppo": {},
}
NOT_OURS = ("data", "valid_share", "stranger_share")  # settings that speak of files of somebody's


def improve(
    place: str | Path,
    *,
    method: str = "dpo",
    offer: str = "better",
    store: str = "",
    held_out: float = 0.3,
    least: int = 40,
    overrides: Sequence[str] = (),
    again: bool = False,
) -> str:
    """Make the next model of a run from what people said, and offer it; returns what came of it, for a person.

    Args:
        place: the run's folder.
        method: one of METHODS.
        offer: one of OFFERS.
        store: where the judgements are, if not in the run's folder.
        held_out: share of the prompts that the comparison is made on.
        least: prompts with a ranking that it takes.
        overrides: ``section.key=value``, of the improvement's sections.
        again: make one though the last was asked for the same and nothing new was said since.

    Raises:
        UsageError: no such method, or no run.
        RunError: the run is in use.
        DataError: too little was said; the message says how much, and what is needed.
    """
    path = Path(place)
    for name, given, known in (("method", method, tuple(METHODS)), ("offer", offer, OFFERS)):
        if given not in known:
            raise UsageError(f"there is no --{name} {given}", hint=did_you_mean(given, known))
    if not (path / "recipe.toml").is_file():
        raise UsageError(f"{path} is no run's folder", hint="lyceum improve runs/demo, of a run that was served")
    recipe = load_recipe(path / "recipe.toml")
    with Run.open(replace(recipe, name=path.resolve().name), path.resolve().parent):
        served = find_checkpoint(path)
        number = next_number(path)
        folder = path / ROUNDS / str(number)
        settings = {"store": store or str(path.resolve()), "held_out": held_out, "least": least}
        tables = recipe_of(recipe, path, number, method, served.checkpoint, settings)
        asked = asked_of(tables, overrides)
        if not again and not folder.exists() and is_repeated(path, number - 1, asked, served.checkpoint):
            return nothing_new(path, number - 1, offer)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "recipe.toml", to_toml(tables))
        river.run_recipe(folder / "recipe.toml", overrides=overrides, runs_dir=path / ROUNDS)
        return close(path, number, METHODS[method][-1], served.checkpoint, offer, asked)


def next_number(path: Path) -> int:
    """The number of the improvement that is under way, or else of the next one."""
    number = 1
    while (path / ROUNDS / str(number) / CLOSED).is_file():
        number += 1
    return number


def recipe_of(
    recipe: Recipe, path: Path, number: int, method: str, start: Path, judgements: Mapping[str, Any]
) -> dict[str, Any]:
    """The improvement's recipe, as tables.

    Args:
        recipe: the run's own, whose settings are taken where it has them.
        path: the run's folder.
        number: of the improvement.
        method: one of METHODS.
        start: the checkpoint that is served.
        judgements: the settings of its judgements section.
    """
    tables: dict[str, Any] = {"name": str(number), "seed": recipe.seed + number, "within": str(path.resolve())}
    tables |= {name: table for name in ("watch", "machine") if (table := getattr(recipe, name))}
    tables["judgements"] = dict(judgements)
    for kind in METHODS[method]:
        own = [section.settings for section in recipe.sections if section.kind == kind]
        settings = own[0] if own else dict(DEFAULTS[kind])
        if kind == "ppo":  # the reward is what people said, whatever it was in the recipe
            has_text = any(section.kind == "pretrain" for section in recipe.sections)
            settings = {**settings, "rewards": {}, "dense": "", **({} if has_text else {"ptx_coef": 0.0})}
        kept = {name: value for name, value in settings.items() if name not in NOT_OURS}
        tables[kind] = {"from": str(start.resolve()), **kept}
    return {**tables, "compare": {}}


def close(path: Path, number: int, trained: str, start: Path, offer: str, asked: str = "") -> str:
    """Offer what was made, if it is to be, and close the improvement; returns what came of it, for a person."""
    folder = path / ROUNDS / str(number)
    found = json.loads((folder / "compare" / "report.json").read_text(encoding="utf-8"))
    is_offered = offer == "always" or (offer == "better" and found["is_better"])
    checkpoint = f"{ROUNDS}/{number}/{trained}/checkpoint"
    kept = {name: value for name, value in found.items() if name not in ("examples", "line")}
    result = {
        "checkpoint": checkpoint,
        "from": str(start.resolve()),
        "offer": offer,
        "is_offered": is_offered,
        "asked": asked,
    }
    write_json(
        folder / CLOSED, {**result, **kept}
    )  # first: killed in between, the next round starts where this one did
    lines = [found["why"]]
    if is_offered:
        section, key = root_of(path, start)
        write_json(path / OFFER, vars(Offer(checkpoint, section, key, time.strftime("%Y-%m-%dT%H:%M:%S%z"))))
        lines.append(_offered(path, checkpoint))
    else:
        lines.append(
            f"not offered: {path} goes on as it was; the same command with --offer always takes it all the same"
        )
    return "\n".join(lines)


def _offered(path: Path, checkpoint: str) -> str:
    return f"offered: {checkpoint}; a server of {path} takes it up by itself, and so does lyceum serve {path}"


def asked_of(tables: Mapping[str, Any], overrides: Sequence[str]) -> str:
    """A digest of what an improvement is asked for, whichever number it has and wherever it starts."""
    kept: dict[str, Any] = {}
    for name, table in tables.items():
        if name not in ("name", "seed"):
            kept[name] = {k: v for k, v in table.items() if k != "from"} if isinstance(table, Mapping) else table
    return hashlib.sha256(json_line([kept, list(overrides)]).encode()).hexdigest()[:32]


def is_repeated(path: Path, number: int, asked: str, served: Path) -> bool:
    """Whether improvement `number` was asked for the same, of the model that is served, and nothing new was said since."""
    folder = path / ROUNDS / str(number)
    if number == 0:
        return False
    last = json.loads((folder / CLOSED).read_text(encoding="utf-8"))
    made = path / last["checkpoint"]
    standing = made if last["is_offered"] else Path(last["from"])
    if last.get("asked") != asked or served.resolve() != standing.resolve() or not made.is_dir():
        return False
    section, report = load_recipe(folder / "recipe.toml").section("judgements"), folder / "judgements" / "report.json"
    if section is None or not report.is_file():  # somebody has tidied up
        return False
    settings = JudgementsConfig(**section.settings)
    learned = json.loads(report.read_text(encoding="utf-8")).get("digest")
    return gather(settings.store, settings.held_out, settings.voices).digest == learned


def nothing_new(path: Path, number: int, offer: str) -> str:
    """What the last improvement came to, for a person; it is offered now if that is asked for, and was not."""
    last = json.loads((path / ROUNDS / str(number) / CLOSED).read_text(encoding="utf-8"))
    said = f"nothing new was said since improvement {number}, whose result stands; --again trains once more"
    if last["is_offered"]:
        return "\n".join([said, last["why"], _offered(path, last["checkpoint"])])
    trained = Path(last["checkpoint"]).parent.name
    return f"{said}\n{close(path, number, trained, Path(last['from']), offer, last['asked'])}"


def root_of(path: Path, start: Path) -> tuple[str, str]:
    """The section of the run that a served checkpoint goes back to, and its key then.

    Raises:
        RunError: the manifest does not know the section.
    """
    before = read_offer(path)
    if before is not None and (path / before.checkpoint).resolve() == start.resolve():
        return before.section, before.key
    name, keys = start.parent.name, read_manifest(path).get("keys", {})
    if name not in keys:
        raise RunError(f"{path / 'manifest.json'} knows no section {name}", hint="run its recipe again: lyceum run")
    return name, keys[name]
