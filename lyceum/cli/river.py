"""The river: runs a recipe's sections in order; `lyceum.cli.kinds` says which stage feeds which.

    lyceum run recipes/demo.toml            make what is missing, go on where a killed run was, show the result
    lyceum run demo --set sft.epochs=4      a changed section, and what flows from it, is made anew
    lyceum run demo --from sft --until ppo  only these; what they start from must be there

A section's key is a hash of its kind, its resolved settings, its parents' keys, its stage's VERSION, its seed, and the
model's table if its stage makes a model. Finished with the same key: not run again, whatever ``--from`` says. Begun
with the same key: gone on with. Another key: the old folder moves to ``old/`` and the section is made anew. The key
knows nothing of what lies outside the run, such as the files of ``corpus.folder``: to read them again, delete the
sections' folders, or change the seed.

With ``--from S`` nothing before S is run: what the chosen sections start from must be finished and unchanged.

With ``rounds = N`` in the recipe rankings, and what learns from them, come N times (`lyceum.config`), as sections like any
other: ``rankings-2`` is drawn from the newest policy before it, while ``ppo-2`` starts where ``ppo`` did.

Keys need the stages' settings, and importing the stages takes seconds. A run whose manifest was written from this very
recipe by this very code has its keys there already: where it is finished, its result is shown at once.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lyceum
from lyceum import device, dist
from lyceum.cli.kinds import CAN_CHAT, KINDS, POLICY, Kind
from lyceum.config import TABLES, Recipe, Section, build, find_recipe, load_recipe, settings_of, to_toml
from lyceum.errors import ConfigError, LyceumError, RunError, did_you_mean
from lyceum.log import log, show_time
from lyceum.run import (
    Run,
    State,
    Work,
    code_version,
    package_versions,
    read_manifest,
    read_state,
    timed,
    write_json,
    write_text,
)
from lyceum.train.machine import machine_config
from lyceum.train.watch import watch_config

REPORT = "lyceum.evals.report"
SHOWN = {"eval", "reward", "compare"}  # kinds of sections that have a part of the page to themselves

# -------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Step:
    """One section, resolved: its settings object, the sections it starts from (role -> name), its seed and its key."""

    section: Section
    kind: Kind
    config: Any
    inputs: dict[str, str]
    seed: int
    key: str

    @property
    def name(self) -> str:
        """The section's name."""
        return self.section.name


def plan(recipe: Recipe) -> list[Step]:
    """Resolve every section of `recipe`: its settings, its inputs, its key.

    Raises:
        ConfigError: an unknown kind or setting, a wrong value, or a section with nothing to start from.
    """
    if not recipe.sections:
        raise ConfigError(f"{recipe.path} has no sections", hint=f"write at least one: {', '.join(KINDS)}")
    for section in recipe.sections:  # all names first: a typo should not wait for heavy imports
        if section.kind not in KINDS:
            message = f"{recipe.path} has a section of an unknown kind {section.kind!r}"
            raise ConfigError(message, hint=did_you_mean(section.kind, [*KINDS, "model"]))
        if section.name == "old":
            raise ConfigError(
                f"{recipe.path}: no section can be named 'old'", hint="that folder keeps replaced sections"
            )
    steps: list[Step] = []
    for section in recipe.sections:
        steps.append(_resolve(section, recipe, steps))
    return steps


def made_from(recipe: Recipe) -> str:
    """A hash of everything that keys are made from: the recipe with its overrides, and all of our code."""
    found = hashlib.blake2b(repr(replace(recipe, path=Path())).encode(), digest_size=12)
    package = Path(lyceum.__file__).parent
    for file in sorted(package.rglob("*.py")):
        found.update(b"%s\0%s\0" % (file.relative_to(package).as_posix().encode(), file.read_bytes()))
    return found.hexdigest()


def remembered(recipe: Recipe, path: Path) -> list[Step] | None:
    """The plan of `recipe` with the keys in the manifest of `path`, without settings; None where keys may differ."""
    manifest, kinds = read_manifest(path), {section.kind: KINDS.get(section.kind) for section in recipe.sections}
    is_ours = all(kind is not None and kind.module.startswith("lyceum.") for kind in kinds.values())
    if not is_ours or manifest.get("made_from") != made_from(recipe):
        return None
    steps: list[Step] = []
    for section in recipe.sections:
        kind = KINDS[section.kind]
        inputs = _find_inputs(section, kind, None, steps, recipe)  # it was valid when it was recorded
        steps.append(Step(section, kind, None, inputs, 0, manifest["keys"][section.name]))
    return steps


def _where(section: Section, recipe: Recipe) -> str:
    name = section.kind if section.kind == section.name else f"{section.kind}.{section.name}"
    return f"[{name}] in {recipe.path}"


def _resolve(section: Section, recipe: Recipe, earlier: Sequence[Step]) -> Step:
    kind, where = KINDS[section.kind], _where(section, recipe)
    module = importlib.import_module(kind.module)
    config = build(getattr(module, kind.config), section.settings, where)
    inputs = _find_inputs(section, kind, config, earlier, recipe)
    seed = int.from_bytes(hashlib.blake2b(f"{recipe.seed}/{section.name}".encode(), digest_size=4).digest(), "big")
    keys = {step.name: step.key for step in earlier}
    made_from = {
        "kind": section.kind,
        "settings": settings_of(config),
        "parents": {role: keys.get(name, name) for role, name in inputs.items()},
        "version": getattr(module, "VERSION", 1),
        "seed": seed,
        "model": recipe.model if kind.makes_model else None,
    }
    text = json.dumps(made_from, sort_keys=True, default=str)
    key = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
    return Step(section, kind, config, inputs, seed, key)


def _find_inputs(section: Section, kind: Kind, config: Any, earlier: Sequence[Step], recipe: Recipe) -> dict[str, str]:
    """Role -> name of the nearest earlier section that can play it, or the folder of what plays it from elsewhere."""
    where = _where(section, recipe)
    if section.source and POLICY not in {wanted.role for wanted in kind.inputs}:
        raise ConfigError(f"{where}: a {section.kind} section starts from no model", hint="leave out 'from'")
    inputs = {}
    for wanted in kind.inputs:
        if (wanted.only_if and not section.settings.get(wanted.only_if)) or (wanted.asked and not section.source):
            continue
        fitting = [step.name for step in earlier if step.section.kind in wanted.kinds]
        kinds = " or ".join(wanted.kinds)
        if wanted.role == POLICY and (source := section.source or _shared_start(section, earlier)):
            if (Path(source) / "config.json").is_file() and source not in fitting:
                inputs[wanted.role] = str(Path(source).resolve())  # a checkpoint from elsewhere
            elif source not in fitting:
                raise ConfigError(
                    f"{where}: from = {source!r} is no earlier section of kind {kinds}, "
                    "and no folder with a config.json",
                    hint=did_you_mean(source, fitting) or f"add a section of kind {kinds} before it",
                )
            else:
                inputs[wanted.role] = source
        elif fitting:
            inputs[wanted.role] = fitting[-1]
            if wanted.every:
                inputs |= {f"{wanted.role}:{name}": name for name in fitting[:-1]}
        elif wanted.needed is True or (config is not None and callable(wanted.needed) and wanted.needed(config)):
            if (outside := _of_other_run(recipe.within, wanted.kinds)) is not None:
                inputs[wanted.role] = str(outside)
                continue
            raise ConfigError(
                f"{where} needs an earlier section of kind {kinds}", hint=f"add [{wanted.kinds[0]}] before {where}"
            )
    return inputs


def _of_other_run(within: str, kinds: Sequence[str]) -> Path | None:
    """The folder of the last finished section of these kinds in the run that a recipe stands within; None if there is none."""
    path = Path(within)
    if not within or not (path / "recipe.toml").is_file():
        return None
    names = [section.name for section in load_recipe(path / "recipe.toml").sections if section.kind in kinds]
    states = {name: read_state(path / name) for name in names}
    finished = [name for name, state in states.items() if state is not None and state.finished]
    return (path / finished[-1]).resolve() if finished else None


def _shared_start(section: Section, earlier: Sequence[Step]) -> str:
    """What a section of a later round starts from: what it did in the first, or that section's own repetition."""
    by_name = {step.name: step for step in earlier}
    start = by_name[section.repeats].inputs.get(POLICY, "") if section.repeats else ""
    own = f"{start}-{section.round}"
    return own if own in by_name and by_name[own].section.repeats == start else start


def choose(steps: Sequence[Step], first: str = "", last: str = "") -> list[Step]:
    """The steps from `first` to `last`, each named by its section or, where only one section has it, its kind."""
    begin = _find(steps, first, "--from") if first else 0
    end = _find(steps, last, "--until") if last else len(steps) - 1
    if begin > end:
        raise ConfigError(f"--from {first} comes after --until {last}", hint="the recipe's order decides")
    return list(steps[begin : end + 1])


def rounds_of(steps: Sequence[Step], step: Step) -> list[Step]:
    """A section, and what it is in later rounds."""
    later = [s for s in steps if s.section.round > 1 and s.name == f"{step.name}-{s.section.round}"]
    return [step, *later]


def _find(steps: Sequence[Step], word: str, option: str) -> int:
    names = [step.name for step in steps]
    if word in names:
        return names.index(word)
    of_kind = [index for index, step in enumerate(steps) if step.section.kind == word]
    if len(of_kind) == 1:
        return of_kind[0]
    several = "several sections" if of_kind else "no section"
    raise ConfigError(f"{option} {word}: the recipe has {several} of that name", hint=did_you_mean(word, names))


# -------------------------------------------------------------------------------- running


def run_recipe(
    recipe_path: str | Path,
    *,
    overrides: Sequence[str] = (),
    first: str = "",
    last: str = "",
    every_round: bool = False,
    runs_dir: str | Path = "runs",
) -> Path:
    """Run a recipe, or the part of it between `first` and `last`; prints the result when the run has one.

    Args:
        every_round: of the one section that is chosen, what it is in later rounds too, as far as their inputs are there.

    Returns:
        The run's folder.

    Raises:
        ConfigError: the recipe is wrong.
        RunError: the run is in use, or something before `first` is missing.
    """
    recipe = load_recipe(find_recipe(recipe_path), overrides)
    path = Path(runs_dir) / recipe.name
    if dist.world_size() == 1 and _show_finished(recipe, path, runs_dir, first, last, every_round):
        return path
    device.prepare("train", threads=_threads_of(path))
    dist.start()
    try:
        steps = plan(recipe)
        watch_config(recipe)
        machine_config(recipe)
        chosen = choose(steps, first, last)
        with Run.open(recipe, runs_dir) if dist.is_main() else Run(path) as run:
            missing_inputs(run, steps, chosen)
            if every_round:
                chosen = ready_rounds(run, steps, chosen[0])
            _check_memory(run, recipe, steps, chosen)
            if dist.is_main():
                record(run, recipe, steps)
            for step in chosen:
                _run_step(run, recipe, step, f"{steps.index(step) + 1}/{len(steps)}")
            if dist.is_main():
                _close(run, recipe, steps)
    finally:
        dist.stop()
    return path


def _show_finished(recipe: Recipe, path: Path, runs_dir: Path | str, first: str, last: str, every_round: bool) -> bool:
    """Show what a run has come to if all that is asked for is plainly finished; otherwise False."""
    steps = remembered(recipe, path)
    chosen = choose(steps, first, last) if steps else []
    if steps and every_round:
        chosen = rounds_of(steps, chosen[0])
    if not steps or not all(Run(path).is_finished(step.name, step.key) for step in chosen):
        return False
    with Run.open(recipe, runs_dir) as run:
        missing_inputs(run, steps, chosen)
        for step in chosen:
            _say_done(run, step, f"{steps.index(step) + 1}/{len(steps)}")
        _close(run, recipe, steps, redraw=False)
    return True


def missing_inputs(run: Run, steps: Sequence[Step], chosen: Sequence[Step]) -> None:
    """Refuse to begin if a chosen section starts from one that is neither chosen nor finished as the recipe has it."""
    by_name = {step.name: step for step in steps}
    for step in chosen:
        for name in step.inputs.values():
            if Path(name).is_absolute():  # a checkpoint from elsewhere
                continue
            if by_name[name] not in chosen and not run.is_finished(name, by_name[name].key):
                state = read_state(run.path / name)
                why = "was never run" if state is None else "is not finished" if not state.finished else "has changed"
                raise RunError(
                    f"{step.name} starts from {name}, which {why} in {run.path}", hint=f"run it first: --from {name}"
                )


def ready_rounds(run: Run, steps: Sequence[Step], step: Step) -> list[Step]:
    """A section, and what it is in later rounds, up to one that starts from what is not there yet; that is said."""
    chosen = rounds_of(steps, step)
    for count in range(2, len(chosen) + 1):
        try:
            missing_inputs(run, steps, chosen[:count])
        except RunError as missing:
            log.info(f"later rounds wait: {missing.message}")
            return chosen[: count - 1]
    return chosen


def _check_memory(run: Run, recipe: Recipe, steps: Sequence[Step], chosen: Sequence[Step]) -> None:
    """Refuse to begin if what is to be trained cannot fit into this machine's memory."""
    begins = {step.name for step in chosen if not run.is_finished(step.name, step.key)}
    if not begins:
        return
    from lyceum.cli.plan import check_memory, needs  # which is made of this module, and imports torch

    found = [need for need in needs(recipe, steps, run.path) if need.name in begins]
    check_memory(found, machine_config(recipe))


def _run_step(run: Run, recipe: Recipe, step: Step, count: str) -> None:
    """Run one section if its key says so; under torchrun rank 0 decides for all."""
    needed = dist.is_main() and not run.is_finished(step.name, step.key)
    if not dist.sum_numbers({"needed": float(needed)})["needed"]:
        _say_done(run, step, count)
        return
    folder = run.folder(step.name)
    wanted = State(step.key, step.section.kind, settings_of(step.config), step.inputs)
    resumes = False
    if dist.is_main():
        folder, resumes = run.begin(step.name, wanted)
    log.title(f"[{count}] {step.name}: {step.kind.help}" + (" (going on where it was)" if resumes else ""))
    dist.barrier()
    work = Work(folder, {role: run.path / name for role, name in step.inputs.items()}, step.seed, recipe)
    if dist.is_main():
        with timed(folder, wanted):
            report = _call(step, work)
            write_json(folder.report, report)
        state = read_state(folder.path)
        line = f"{report['line']} | " if report.get("line") else ""
        log.info(f"      {line}{show_time(state.wall_s if state else 0)}")
    elif step.kind.every_rank:
        _call(step, work)
    dist.barrier()


def _say_done(run: Run, step: Step, count: str) -> None:
    state = read_state(run.path / step.name)
    log.info(f"[{count}] {step.name}: done before ({show_time(state.wall_s if state else 0)})")


def _call(step: Step, work: Work) -> dict[str, Any]:
    """The section's entry function; the traceback of a mistake of ours is kept in the run's folder."""
    entry = importlib.import_module(step.kind.module).run
    try:
        return entry(step.config, work)
    except LyceumError:
        raise
    except Exception:
        import traceback

        place = work.folder.path.parent / "traceback.txt"
        try:
            write_text(place, traceback.format_exc())
            log.warning(f"{step.name} stopped; the traceback is in {place}")
        except (OSError, LyceumError):
            pass  # what went wrong first matters more
        raise


def _close(run: Run, recipe: Recipe, steps: Sequence[Step], redraw: bool = True) -> None:
    """Show what the run has come to: the report, once there is something to show on its page, and how to go on.

    Without `redraw` its page is left as it is, if nothing of what it shows has changed since.
    """
    finished = [step for step in steps if run.is_finished(step.name, step.key)]
    kinds = {step.section.kind for step in finished}
    built = importlib.import_module(REPORT).build(run.path, recipe, redraw=redraw) if kinds & SHOWN else None
    if built and "eval" in kinds:
        print("\n".join(built["lines"]))
    else:
        states = [state for step in finished if (state := read_state(run.path / step.name)) is not None]
        spent = show_time(sum(state.wall_s for state in states))
        print(f"schooling so far: {spent} for {len(finished)} of {len(steps)} sections, in {run.path}")
        if built:
            print(f"report: {built['path']}")
    if any(step.section.kind in CAN_CHAT for step in finished):
        print(f"talk to it: lyceum chat {run.path}")
    sys.stdout.flush()


# -------------------------------------------------------------------------------- the record


def record(run: Run, recipe: Recipe, steps: Sequence[Step]) -> None:
    """Write the recipe as resolved and the manifest; warn if an unfinished run goes on under other conditions."""
    tables: dict[str, Any] = {"name": recipe.name, "seed": recipe.seed}
    tables |= {"within": recipe.within} if recipe.within else {}
    tables |= {name: table for name in TABLES if (table := getattr(recipe, name))}
    for step in steps:
        kind, name = step.section.kind, step.name
        source = {"from": step.inputs[POLICY]} if POLICY in step.inputs else {}
        tables[kind if kind == name else f"{kind}.{name}"] = {**source, **settings_of(step.config)}
    packages = package_versions()
    manifest = {
        "lyceum": lyceum.__version__,
        "code": code_version(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "recipe": str(recipe.path),
        "seed": recipe.seed,
        "seeds": {step.name: step.seed for step in steps},
        "keys": {step.name: step.key for step in steps},
        "made_from": made_from(recipe),
        "threads": device.num_threads(),
        "ranks": dist.world_size(),
        "python": platform.python_version(),
        "packages": packages,
        "machine": device.facts(),
    }
    before = read_manifest(run.path)
    if not all(run.is_finished(step.name, step.key) for step in steps):
        for name, was, now in (
            ("threads", before.get("threads"), manifest["threads"]),
            ("torch", before.get("packages", {}).get("torch"), packages["torch"]),
        ):
            if was is not None and was != now:
                log.warning(f"this run was begun with {name} {was}, now {now}: results will differ in the last digits")
    (run.path / "traceback.txt").unlink(missing_ok=True)  # of an earlier start
    write_text(run.path / "recipe.toml", to_toml(tables))
    write_json(run.path / "manifest.json", manifest)


def _threads_of(path: Path) -> int | None:
    """The number of threads that the run in `path` was begun with: a resumed run keeps it, for equal sums."""
    threads = read_manifest(path).get("threads")
    return threads if isinstance(threads, int) and 0 < threads <= (os.cpu_count() or 1) else None
