"""The command line: ``lyceum VERB ...``. Verbs, options and how errors are shown; what a verb does stands elsewhere.

    lyceum run demo                     a whole recipe         lyceum chat runs/demo       talk to what it made
    lyceum sft demo --set sft.epochs=4  one stage of it        lyceum sft --help           its settings
    lyceum plan demo                    what it would take
    lyceum serve runs/demo              its chat page and its API over HTTP
    lyceum keys new runs/demo ann       a key for it       lyceum keys list runs/demo
    lyceum runs                         what runs there are    lyceum runs demo second     what differs between two
    lyceum models runs/demo             its models: which comes from which, and what each learned from
    lyceum export runs/demo --to gguf   its model as a file for llama.cpp
    lyceum feedback export runs/demo --to rankings.jsonl    what people said about its answers, to learn from
    lyceum improve runs/demo            learn from it, and offer the better model to who serves the run
    lyceum arena runs/demo              ratings of models from blind votes
    lyceum lab overoptimisation         how far a policy may follow a reward model

Why argparse: ``lyceum --help`` answers in a tenth of a second. Importing typer and drawing its help took three times as
long as all of Python's start (0.32 s where this takes 0.06). No verb's package is imported before the verb is known.

Exit codes: 0 done, 1 a failure, 2 a wrong command or recipe, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from lyceum import __version__
from lyceum.errors import LyceumError, ResourceError, UsageError, did_you_mean

ABOUT = """Lyceum schools a language model: from raw text, through pretraining, supervised fine-tuning,
a reward model and PPO, to an assistant you can talk to."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours, and whose help can end in text that is costly to make."""

    def error(self, message: str) -> NoReturn:
        """A wrong command line."""
        raise UsageError(message, hint=f"{self.prog} --help")

    def format_help(self) -> str:
        """The help; a stage's verb adds its settings."""
        kind = self.get_default("kind")
        return super().format_help() + (f"\n{settings_help(kind)}" if kind else "")


def make_parser() -> Parser:
    """The verbs and their options."""
    from lyceum.cli.kinds import KINDS

    parser = Parser(prog="lyceum", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"lyceum {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")

    run = _verb(verbs, "run", "run a recipe: make what is missing, go on where a killed run was, show the result")
    _recipe_options(run)
    run.add_argument("--from", dest="first", default="", metavar="SECTION", help="begin with this section")
    run.add_argument("--until", dest="last", default="", metavar="SECTION", help="end with this section")
    run.set_defaults(do=_run)

    plan = _verb(
        verbs, "plan", "say what a recipe would take: weights, memory, time and cost on this and other machines"
    )
    _recipe_options(plan)
    plan.add_argument("--price", type=float, default=0.0, metavar="MONEY", help="of an hour of a GPU; shows the cost")
    plan.set_defaults(do=_plan, first="", last="")

    chat = _verb(verbs, "chat", "talk to a run or a checkpoint in the terminal")
    chat.add_argument("path", metavar="RUN_OR_CHECKPOINT", help="a run's folder, a section's, or a checkpoint's")
    chat.add_argument("-p", "--prompt", metavar="TEXT", help="answer this once and leave")
    chat.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token always")
    chat.add_argument("--max-tokens", type=int, default=256, help="longest answer, in tokens (default 256)")
    chat.add_argument("--stage", default="", help="which section of the run talks; by default the most schooled")
    chat.add_argument("--save", metavar="FILE", help="write the conversation there at the end, as a line of JSON")
    chat.add_argument(
        "--lookup",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="let the model look names of this installed package up; may be given more than once",
    )
    chat.set_defaults(do=_chat)

    serve = _verb(verbs, "serve", "answer over HTTP, as OpenAI's API does")
    _serve_options(serve)
    serve.set_defaults(do=_serve)

    runs = _verb(verbs, "runs", "list runs, show one, or compare several")
    runs.add_argument(
        "paths", nargs="*", metavar="RUN", help="a folder of runs (default: runs), a run, or several runs"
    )
    runs.add_argument("--section", default="", help="compare: whose metric to show over the steps")
    runs.add_argument("--metric", default="loss", help="compare: which one, as in metrics.jsonl (default: loss)")
    runs.add_argument("--json", action="store_true", dest="as_json", help="one JSON value instead of tables")
    runs.set_defaults(do=_runs)
    models = _verb(verbs, "models", "show models: which comes from which, and what each learned from")
    models.add_argument("paths", nargs="*", metavar="RUN", help="runs, or a folder of runs (default: runs)")
    models.add_argument("--all", action="store_true", dest="is_all", help="also snapshots and members of ensembles")
    models.add_argument("--json", action="store_true", dest="as_json", help="one JSON value instead of a tree")
    models.set_defaults(do=_models)
    export = _verb(verbs, "export", "write a run's or a checkpoint's model as a file for other programs")
    export.add_argument("path", metavar="CHECKPOINT", help="a run's folder, a section's, or a checkpoint's")
    export.add_argument("--to", choices=["gguf"], default="gguf", help="gguf: one file for llama.cpp and its like")
    export.add_argument("--type", choices=["f32", "f16", "q8_0"], default="f16", help="of the matrices (default f16)")
    export.add_argument("-o", "--out", default="", metavar="FILE", help="by default named after the model, here")
    export.add_argument("--stage", default="", help="which section of the run; by default the most schooled")
    export.set_defaults(do=_export)

    feedback = _verb(verbs, "feedback", "what people said about answers, as files to learn from")
    deeds = feedback.add_subparsers(dest="deed", metavar="export", required=True)
    export = _verb(deeds, "export", "write rankings, ratings or corrections, and a held-out share of them")
    export.add_argument("path", metavar="RUN_OR_STORE", help="a run's folder, a store's file, or its address")
    export.add_argument("--to", required=True, metavar="FILE.jsonl", help="held-out rows go to FILE-held-out.jsonl")
    export.add_argument(
        "--format",
        default="rankings",
        help="ours: rankings (default), ratings, conversations, labels, presses; trl, hh: pairs; kto: thumbs; messages, sharegpt",
    )
    export.add_argument("--held-out", type=float, default=0.1, metavar="SHARE", help="of the prompts (default 0.1)")
    export.add_argument(
        "--voices",
        default="consensus",
        help="of several who ranked the same answers on the labelling page: consensus (default), or each one",
    )
    export.set_defaults(do=_feedback_export)
    _keys_options(_verb(verbs, "keys", "who may ask a server: make keys, list, rename and revoke them"))
    arena = _verb(verbs, "arena", "rate models by the blind votes of people on pairs of answers")
    arena.add_argument("path", metavar="RUN_OR_STORE", help="a run's folder, a store's file, or its address")
    arena.add_argument("--kind", default="", help="only votes on prompts of this kind")
    arena.add_argument("--style", action="store_true", help="take out what length and markdown of the answers explain")
    arena.add_argument("--json", action="store_true", dest="as_json", help="one JSON value instead of tables")
    arena.set_defaults(do=_arena)
    improve = _verb(verbs, "improve", "learn from what people said about a run's answers, and offer the next model")
    _improve_options(improve)
    improve.set_defaults(do=_improve)
    lab = _verb(verbs, "lab", "run an experiment on models of its own: overoptimisation")
    lab.add_argument("experiment", choices=["overoptimisation"], help="which (Gao et al. 2022: gold score against KL)")
    lab.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="change a setting of the experiment; may be given more than once",
    )  # fmt: skip
    lab.add_argument("--out", default="", metavar="DIR", help="its folder (default: runs/lab-overoptimisation)")
    lab.set_defaults(do=_lab)

    for name, kind in KINDS.items():
        verb = _verb(verbs, name, kind.help)
        _recipe_options(verb)
        verb.set_defaults(do=_run, first=name, last=name, kind=name)
    return parser


def _verb(verbs: Any, name: str, help: str) -> Parser:
    parser = verbs.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _serve_options(parser: Parser) -> None:
    add = parser.add_argument
    add("path", nargs="?", metavar="RUN_OR_CHECKPOINT", help="a run's folder, a section's, or a checkpoint's")
    add(
        "--model",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="another model, under this name; may be repeated",
    )
    add("--stage", default="", help="which section of each run; by default the most schooled")
    add("--host", default="127.0.0.1", help="the address to listen on (default 127.0.0.1: this machine only)")
    add("--port", type=int, default=8000, help="0 takes any free one (default 8000)")
    add(
        "--api-key",
        default=os.environ.get("LYCEUM_API_KEY", ""),
        metavar="KEY",
        help="ask for it, beside those of `lyceum keys`; also LYCEUM_API_KEY",
    )
    add("--allow-host", action="append", default=[], metavar="NAME", help="a name under which the server is reached")
    add("--allow-origin", action="append", default=[], metavar="URL", help="a site whose pages may use the server")
    add("--max-batch", type=int, default=16, help="replies side by side, of each model (default 16)")
    add(
        "--compile",
        action="store_true",
        dest="swift",
        help="compile a small model's steps in the background (C++ compiler)",
    )
    add("--max-tokens", type=int, default=0, help="longest reply (default: the model's context)")
    add("--queue", type=int, default=256, help="replies that may wait; more are told to come again (default 256)")
    add("--per-key", type=int, default=256, help="replies under way for one key (default 256)")
    add("--tokens-per-minute", type=int, default=0, help="of one key, prompts and replies (default: no bound)")
    add(
        "--store",
        default="",
        metavar="PLACE",
        help="where chats are kept: a file or postgresql://... (default: in the run)",
    )
    add("--runs", default="", metavar="DIR", help="whose runs the page /runs shows (default: where the served run is)")
    add("--files", default="", metavar="DIR", help="where uploaded files and jobs are kept (default: beside the store)")
    add(
        "--jobs",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="fine-tuning over the API (default: only where others cannot reach the server)",
    )
    add("--jobs-at-once", type=int, default=1, help="fine-tuning jobs side by side; others wait (default 1)")
    add("--job-threads", type=int, default=0, help="that a job computes on (default: half of the cores)")
    add("--job-memory", type=float, default=0.0, metavar="GB", help="that a job may take (default: half of it)")
    add("--certificate", default="", metavar="FILE", help="PEM, for TLS")
    add("--private-key", default="", metavar="FILE", help="PEM, for TLS")


def _keys_options(parser: Parser) -> None:
    deeds = parser.add_subparsers(dest="deed", metavar="DEED", required=True)
    says = {
        "new": "make a key and show it, once; its hash is kept",
        "list": "show all keys, those that have ended too",
        "rename": "call a key something else",
        "revoke": "end a key now; its chats stay",
        "forget": "take a key off the list",
    }
    for deed, help in says.items():
        verb = _verb(deeds, deed, help)
        verb.add_argument("path", metavar="RUN_OR_STORE", help="a run's folder, a store's file, or its address")
        if deed in ("rename", "revoke", "forget"):
            verb.add_argument("id", metavar="ID", help="as the list shows it")
        if deed in ("new", "rename"):
            verb.add_argument("name", metavar="NAME", help="the person or the program that will use it")
        verb.set_defaults(do={"new": _keys_new, "list": _keys_list}.get(deed, _keys_change))
        if deed == "new":
            verb.add_argument(
                "--scope",
                action="append",
                default=[],
                help="models, inference, metrics, training, runs, admin; may be repeated (default: the first two)",
            )
            verb.add_argument("--days", type=float, default=0.0, help="for how long it is good (default: for ever)")
            verb.add_argument("--owner", default="", help="whose chats it opens (default: its own)")


def _improve_options(parser: Parser) -> None:
    add = parser.add_argument
    add("path", metavar="RUN", help="a run's folder")
    add(
        "--method",
        default="dpo",
        help="dpo (default): the policy learns from rankings; ppo: from a reward model of them",
    )
    add("--offer", default="better", help="when it is to be served: better (default: if shown to be so), always, never")
    add("--store", default="", metavar="PLACE", help="where the judgements are (default: in the run)")
    add("--held-out", type=float, default=0.3, metavar="SHARE", help="of the prompts, to compare by (default 0.3)")
    add("--least", type=int, default=40, metavar="N", help="prompts with a ranking that it takes (default 40)")
    add("--again", action="store_true", help="train once more though nothing new was said since the last time")
    _override_option(parser, "change a setting of the improvement, such as preference.lr; may be given more than once")


def _recipe_options(parser: Parser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe's .toml file, or the name of a packaged one (demo)")
    _override_option(parser, "change a setting of the recipe; may be given more than once")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="where runs live (default: runs)")


def _override_option(parser: Parser, help: str) -> None:
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE", help=help)


def settings_help(kind: str) -> str:
    """The settings of a section kind, each with its default and its sentence."""
    import dataclasses
    import importlib
    import textwrap

    from lyceum import device
    from lyceum.cli.kinds import KINDS

    device.prepare("help")
    config = getattr(importlib.import_module(KINDS[kind].module), KINDS[kind].config)
    lines = [f"settings of a [{kind}] section, with their defaults:"]
    for field in dataclasses.fields(config):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        lines.append(f"  {field.name} = {list(default) if isinstance(default, tuple) else default!r}")
        lines += textwrap.wrap(field.metadata.get("help", ""), 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines) + "\n"


def _run(args: argparse.Namespace) -> None:
    from lyceum.cli import river

    asked = {"overrides": args.overrides, "first": args.first, "last": args.last, "runs_dir": args.runs}
    river.run_recipe(args.recipe, **asked, every_round=bool(getattr(args, "kind", "")))  # a verb is all of its rounds


def _plan(args: argparse.Namespace) -> None:
    from lyceum import device

    device.prepare("plan")  # before torch is imported
    from lyceum.cli import plan

    print(plan.plan(args.recipe, overrides=args.overrides, runs_dir=args.runs, price=args.price))


def _chat(args: argparse.Namespace) -> None:
    from lyceum.cli import chat

    chat.chat(
        args.path,
        prompt=args.prompt,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
        stage=args.stage,
        save=args.save,
        lookup=args.lookup,
    )


def _serve(args: argparse.Namespace) -> None:
    from lyceum.cli import serve

    serve.serve(args)


def _runs(args: argparse.Namespace) -> None:
    from lyceum.cli import runs

    runs.runs(args.paths, section=args.section, metric=args.metric, as_json=args.as_json)


def _models(args: argparse.Namespace) -> None:
    from lyceum.cli import models

    models.models(args.paths, is_all=args.is_all, as_json=args.as_json)


def _export(args: argparse.Namespace) -> None:
    from pathlib import Path

    from lyceum import device
    from lyceum.cli.chat import find_checkpoint

    device.prepare("export")
    from lyceum.model.gguf import export_gguf

    done = export_gguf(find_checkpoint(Path(args.path), args.stage).checkpoint, args.out, args.type)
    counts = ", ".join(f"{count} {kind}" for kind, count in done.num_tensors.items())
    print(f"{done.path}: {done.num_bytes / 1e6:.1f} MB; tensors: {counts}")
    if done.kept_f16:
        print(f"f16 instead of q8_0, because their rows are no multiple of 32 numbers: {', '.join(done.kept_f16)}")


def _feedback_export(args: argparse.Namespace) -> None:
    from lyceum.cli import feedback

    print(feedback.export(args.path, args.to, args.format, args.held_out, args.voices))


def _arena(args: argparse.Namespace) -> None:
    from lyceum.cli import arena

    print(arena.arena(args.path, kind=args.kind, controls_style=args.style, as_json=args.as_json))


def _keys_new(args: argparse.Namespace) -> None:
    from lyceum.cli import keys

    print(keys.new(args.path, args.name, scopes=args.scope, days=args.days, owner=args.owner))


def _keys_list(args: argparse.Namespace) -> None:
    from lyceum.cli import keys

    print(keys.listed(args.path))


def _keys_change(args: argparse.Namespace) -> None:
    from lyceum.cli import keys

    print(keys.change(args.path, args.deed, args.id, getattr(args, "name", "")))


def _improve(args: argparse.Namespace) -> None:
    from lyceum.cli import improve

    done = improve.improve(
        args.path,
        method=args.method,
        offer=args.offer,
        store=args.store,
        held_out=args.held_out,
        least=args.least,
        overrides=args.overrides,
        again=args.again,
    )
    print(done)


def _lab(args: argparse.Namespace) -> None:
    from lyceum.cli import lab

    lab.lab(args.experiment, overrides=args.overrides, out=args.out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    given = next((word for word in words if not word.startswith("-")), None)
    try:
        parser = make_parser()
        verbs = [str(verb) for action in parser._subparsers._group_actions for verb in action.choices or ()]  # type: ignore[union-attr]
        if given is not None and given not in verbs:
            raise UsageError(f"there is no verb {given!r}", hint=did_you_mean(given, verbs))
        args = parser.parse_args(words)
        if args.verb is None:
            parser.print_help()
            return 0
        args.do(args)
        return 0
    except KeyboardInterrupt:
        print(
            "\nstopped" if given in ("chat", "serve") else "\nstopped; the same command goes on where it was",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:  # the reader of our output has gone; nothing is left to say, at exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        said = as_lyceum_error(error)
        print(f"error: {said}", file=sys.stderr)
        return said.exit_code


def as_lyceum_error(error: Exception) -> LyceumError:
    """The error as the person should read it."""
    if isinstance(error, LyceumError):
        return error
    text = str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            f"the disk is full: {error.filename or text}", hint="free some space and start the same command again"
        )
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return ResourceError(
            f"the machine has not enough memory: {text.splitlines()[0] if text else 'allocation failed'}",
            hint="make micro_tokens or the model smaller",
        )
    return LyceumError(
        f"{type(error).__name__}: {text}", hint="this looks like a mistake in lyceum itself; --debug shows where"
    )
