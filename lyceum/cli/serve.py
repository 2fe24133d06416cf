"""``lyceum serve runs/demo``: the API and the chat page over one model or several, until Ctrl-C.

The model is named after its run's folder, or as ``--model name=path`` says, which may be given more than once. What is
served is chosen as in the terminal chat (`lyceum.cli.chat.find_checkpoint`); what `lyceum improve` offers of a run takes its
place, at the start and while the server runs, unless ``--stage`` names a section. The page's conversations are kept in the first
run's folder, or where ``--store`` says; the keys that it asks for are there too (`lyceum.cli.keys`). Its page of
runs shows the folder that the first run is in, or ``--runs``.

It only finds folders and hands them over: the server is `lyceum.serve.server`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lyceum import device
from lyceum.errors import LyceumError, UsageError

if TYPE_CHECKING:
    from lyceum.cli.chat import Choice


def serve(args: argparse.Namespace) -> None:
    """Do what the command line asks.

    Raises UsageError where it makes no sense or the folder of runs is not there, RunError or CheckpointError where there is
    nothing to serve.
    """
    from lyceum.cli.chat import find_about, find_checkpoint

    if args.runs and not Path(args.runs).is_dir():
        raise UsageError(f"there is no folder {args.runs}", hint="--runs FOLDER: the one that holds the runs")
    choices: dict[str, Choice] = {}
    runs: dict[str, Path] = {}
    for name, path in named(args.path, args.model):
        if name in choices:
            raise UsageError(f"two models are named {name!r}", hint="name them apart: --model NAME=PATH")
        choices[name] = find_checkpoint(path, args.stage, takes_offer=False)
        if (path / "recipe.toml").is_file() and not args.stage:
            runs[name] = path
    folders = {name: choice.checkpoint for name, choice in choices.items()}
    first = next(iter(choices.values()))
    device.prepare("serve")  # before torch is imported
    try:
        from lyceum.serve.limits import Limits
        from lyceum.serve.server import ServerConfig, is_local
        from lyceum.serve.server import serve as run
        from lyceum.serve.tuning.foreman import Crew
    except ModuleNotFoundError as error:
        raise LyceumError(f"the server needs the package {error.name}", hint="pip install 'lyceum[serve]'") from None
    limits = Limits(
        max_tokens=args.max_tokens,
        waiting=args.queue,
        per_caller=args.per_key,
        tokens_per_minute=args.tokens_per_minute,
    )
    config = ServerConfig(
        host=args.host,
        port=args.port,
        api_key=args.api_key,
        allow_host=tuple(args.allow_host),
        allow_origin=tuple(args.allow_origin),
        max_batch=args.max_batch,
        swift=args.swift,
        certificate=args.certificate,
        private_key=args.private_key,
        store=args.store or str(run_folder(first.checkpoint)),
        about=find_about(first, saved_info(first.checkpoint)),
        runs=runs,
        shelf=Path(args.runs) if args.runs else shelf_of(first.checkpoint),
        files=args.files or (str(run_folder(first.checkpoint) / "store.files") if "://" in args.store else ""),
        jobs=is_local(args.host) if args.jobs is None else args.jobs,
        crew=Crew(args.jobs_at_once, args.job_threads, int(args.job_memory * (1 << 30))),
        limits=limits,
    )
    run(folders, config)


def run_folder(checkpoint: Path) -> Path:
    """The run that a checkpoint belongs to, whose store the conversations go to; of one from elsewhere, its own folder.

    Of an improvement, which is a run within a run, it is the outer one.
    """
    runs = [folder for folder in checkpoint.resolve().parents if (folder / "recipe.toml").is_file()]
    return runs[-1] if runs else checkpoint


def shelf_of(checkpoint: Path) -> Path | None:
    """The folder in which the run of a checkpoint stands beside others; None for one from elsewhere."""
    run = run_folder(checkpoint)
    return run.parent if (run / "recipe.toml").is_file() else None


def saved_info(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; nothing if it was made elsewhere."""
    from lyceum.model.hub import read_json

    return read_json(checkpoint / "lyceum.json") if (checkpoint / "lyceum.json").is_file() else {}


def named(path: str | None, models: list[str]) -> list[tuple[str, Path]]:
    """(name, path) of what is to be served, the first the default."""
    found = [] if path is None else [(Path(path).resolve().name, Path(path))]
    for model in models:
        name, equals, where = model.partition("=")
        if not (name and equals and where):
            raise UsageError(
                f"--model {model!r} names no model", hint="--model NAME=PATH, such as --model tutor=runs/demo"
            )
        found.append((name, Path(where)))
    if not found:
        raise UsageError("there is nothing to serve", hint="lyceum serve runs/demo, or --model NAME=PATH")
    return found
