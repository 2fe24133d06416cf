"""The terminal chat: ``lyceum chat runs/demo``.

It opens with what the model studied and three questions to ask, streams the answers, keeps the conversation, and knows

    /reset   begin a new conversation         /save FILE   write this one, as a line of JSON (a Conversation)
    /help    these lines                      /quit        leave; so does Ctrl-D, and Ctrl-C twice at the prompt

Ctrl-C during an answer stops the answer. ``-p TEXT`` answers once: the answer goes to the standard output, the rest to
the standard error. Answers are greedy unless ``--temperature`` says otherwise. ``--lookup PACKAGE`` opens the book: the
model may look names of the package up, with the tool `lyceum.tools.lookup`, if its lesson taught it to.

It gives the model no other tools and no guards, and it is one conversation on one terminal: no server.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lyceum import device
from lyceum.cli.kinds import CAN_CHAT
from lyceum.config import Recipe, load_recipe
from lyceum.errors import CheckpointError, LyceumError, RunError, UsageError, did_you_mean
from lyceum.run import StageFolder, offered, read_manifest, read_state

if TYPE_CHECKING:
    from lyceum.engine.session import Session

COMMANDS = """/reset      begin a new conversation
/save FILE  write this conversation to FILE
/help       these lines
/quit       leave (as does Ctrl-D); Ctrl-C stops an answer"""

# a model may write any byte; those that would drive the terminal are shown as the replacement character
CONTROL = {code: "\ufffd" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


@dataclass(frozen=True)
class Choice:
    """The checkpoint that talks, and how it was come by, in words."""

    checkpoint: Path
    words: str
    kind: str = ""


def chat(
    path: str | Path,
    *,
    prompt: str | None = None,
    temperature: float = 0.0,
    max_tokens: int = 256,
    stage: str = "",
    save: str | None = None,
    lookup: Sequence[str] = (),
) -> None:
    """Talk to the model in `path`.

    Args:
        path: a run's folder, a section's, or a checkpoint's.
        prompt: answer this and return; None opens the conversation.
        temperature: 0 is greedy.
        max_tokens: the longest answer.
        stage: of a run, the section that talks; empty for the most schooled one that is finished.
        save: where to write the conversation at the end.
        lookup: packages whose names the model may look up.

    Raises:
        UsageError: an option makes no sense.
        DataError: a package to look up in is not installed.
        RunError, CheckpointError: there is nothing in `path` that talks.
    """
    if temperature < 0 or max_tokens < 1:
        raise UsageError(
            f"temperature {temperature} and max-tokens {max_tokens} make no answer",
            hint="a temperature is 0 or more, an answer at least 1 token long",
        )
    choice = find_checkpoint(Path(path), stage)
    _say(f"talking to {choice.words}")
    session, info = open_session(choice, temperature, max_tokens, lookup)
    if prompt is not None:
        if not answer(session, prompt):
            raise KeyboardInterrupt
    else:
        _say(opening(find_about(choice, info), lookup))
        if choice.kind == "pretrain":
            _say("This one was only pretrained: it continues text, and has not learned to answer.")
        converse(session)
    if save is not None:
        write_conversation(session, Path(save))


# -------------------------------------------------------------------------------- which model


def find_checkpoint(path: Path, stage: str = "", *, takes_offer: bool = True) -> Choice:
    """The checkpoint meant by `path`: itself, a section's, or of a run the one that it offers, else its last stage that talks.

    takes_offer: False leaves out what `lyceum improve` has made; so does naming a stage.
    """
    if not path.exists():
        beside = Path("runs") / path
        hint = f"did you mean {beside}?" if beside.is_dir() else "make one first: lyceum run demo"
        raise RunError(f"there is no run or checkpoint {path}", hint=hint)
    if (path / "recipe.toml").is_file():
        return _of_run(path, stage, takes_offer)
    if stage:
        raise UsageError(f"{path} is not a run's folder, so it has no stage {stage!r}", hint="leave out --stage")
    if (path / "config.json").is_file():
        return Choice(path, str(path))
    if (checkpoint := StageFolder(path).checkpoint).is_dir():
        return Choice(checkpoint, str(checkpoint))
    raise CheckpointError(f"{path} is neither a run nor a checkpoint", hint="a checkpoint's folder has a config.json")


def _of_run(path: Path, stage: str, takes_offer: bool) -> Choice:
    recipe = load_recipe(path / "recipe.toml")
    if stage:
        names = [section.name for section in recipe.sections if stage in (section.name, section.kind)]
        if not names:
            raise UsageError(
                f"{path} has no stage {stage!r}",
                hint=did_you_mean(stage, [section.name for section in recipe.sections]),
            )
        name = names[-1]
        if not StageFolder(path / name).checkpoint.is_dir():
            raise RunError(
                f"{name} of {path} has no checkpoint", hint="finish it: lyceum run, or choose another --stage"
            )
        return _choice(path, recipe, name, "as you chose")
    improved, why = offered(path) if takes_offer else (None, "")
    if improved is not None:
        return Choice(improved, f"the improved model ({improved})")
    keys = read_manifest(path).get("keys", {})
    passed_over = [why] if why else []
    for name in _talking(recipe):
        state = read_state(path / name)
        if state is None or not state.finished:
            passed_over.append(f"{name} is not finished")
        elif state.key != keys.get(name, state.key):
            passed_over.append(f"{name} is from before the recipe changed")
        else:
            return _choice(path, recipe, name, f"since {' and '.join(passed_over)}" if passed_over else "")
    why = "; ".join(passed_over) or "its recipe has none"
    raise RunError(f"no stage of {path} can talk: {why}", hint="go on with the run, or choose: --stage sft")


def _talking(recipe: Recipe) -> list[str]:
    """The names of the sections whose checkpoint talks: the most schooled first, of one kind the last first."""
    return [s.name for kind in CAN_CHAT for s in reversed(recipe.sections) if s.kind == kind]


def _choice(path: Path, recipe: Recipe, name: str, why: str) -> Choice:
    checkpoint = StageFolder(path / name).checkpoint
    section = recipe.section(name)
    kind = section.kind if section is not None else ""
    return Choice(checkpoint, f"the model of stage {name}{', ' + why if why else ''} ({checkpoint})", kind)


def open_session(
    choice: Choice, temperature: float, max_tokens: int, packages: Sequence[str] = ()
) -> tuple[Session, dict[str, Any]]:
    """Load the model and put an engine and a session around it; also what its lyceum.json says.

    Args:
        packages: where the model may look names up; none, and it is offered no tool.
    """
    device.prepare("chat")
    from lyceum.corpus.records import Conversation, Message
    from lyceum.engine.engine import Engine
    from lyceum.engine.sampling import SamplingParams
    from lyceum.engine.session import Session
    from lyceum.model.checkpoint import load_checkpoint
    from lyceum.model.transformer import Decoder
    from lyceum.tokens.chat import ChatFormat
    from lyceum.tools import lookup

    book = lookup.Lookup.of_packages(packages) if packages else None
    loaded = load_checkpoint(choice.checkpoint)
    if not isinstance(loaded.model, Decoder):
        raise CheckpointError(
            f"{choice.checkpoint} gives scores, not text", hint="talk to another stage: --stage sft, or ppo"
        )
    if loaded.tokenizer is None:
        raise CheckpointError(f"{choice.checkpoint} has no tokenizer", hint="add its tokenizer.json")
    format = ChatFormat(loaded.tokenizer)
    engine = Engine(loaded.model, max_batch=1, token_bytes=loaded.tokenizer.token_bytes, guess=True)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, stop_ids=format.stop_ids)
    if book is None:
        return Session(engine, format, params=params), loaded.info
    start = Conversation((Message("system", ""),), (lookup.SCHEMA,))
    return Session(engine, format, tools={lookup.NAME: book}, params=params, start=start), loaded.info


# -------------------------------------------------------------------------------- what it says of itself


def find_about(choice: Choice, info: dict[str, Any]) -> dict[str, Any]:
    """What the model studied: from its checkpoint, else from the lessons of its run; empty for a foreign checkpoint."""
    if info.get("about"):
        return dict(info["about"])
    # an improved model's lessons are those of the run that it stands within
    folders = choice.checkpoint.resolve().parents
    runs = [choice.checkpoint.parent.parent, *(folder for folder in folders if (folder / "recipe.toml").is_file())]
    for report in (file for folder in runs for file in sorted(folder.glob("*/report.json"))):
        try:
            about = json.loads(report.read_text(encoding="utf-8")).get("about")
        except (OSError, ValueError, AttributeError):
            continue
        if about:
            return dict(about)
    return {}


def opening(about: dict[str, Any], lookup: Sequence[str] = ()) -> str:
    """The lines the chat opens with; `lookup`: the packages in which the model may look names up."""
    lines = []
    if about.get("studied"):
        lines.append(f"It studied {about['studied']}.")
    if about.get("cannot"):
        lines.append(str(about["cannot"]))
    if about.get("ask"):
        lines += ["Ask it, for example:", *(f"  {question}" for question in about["ask"][:3])]
    if lookup:
        lines.append(f"It may look up what belongs to {', '.join(lookup)}: ask by the whole dotted name.")
    return "\n".join([*lines, "/help shows the commands; Ctrl-C stops an answer, Ctrl-D leaves."])


# -------------------------------------------------------------------------------- the conversation


def converse(session: Session) -> None:
    """Read, answer, until the person leaves."""
    try:
        import readline  # noqa: F401  # arrow keys and history at the prompt
    except ImportError:
        pass
    stopped_once, told = False, 0
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            if stopped_once:
                return
            stopped_once = True
            _say("Ctrl-C again leaves, and so does Ctrl-D")
            continue
        stopped_once = False
        if said.startswith("/"):
            if not command(session, said):
                return
        elif said:
            try:
                answer(session, said)
            except KeyboardInterrupt:  # pressed again before the first was heard: still only the answer
                print()
            except LyceumError as error:  # such as a conversation that has grown too long: it can be mended from here
                _say(f"error: {error}")
            if session.dropped > told:
                told = session.dropped
                _say(f"(the first {told} messages no longer fit its context: it does not see them)")


def command(session: Session, said: str) -> bool:
    """Do a slash command; False if it was to leave."""
    word, _, rest = said.partition(" ")
    if word in ("/quit", "/exit"):
        return False
    if word == "/reset":
        session.reset()
        _say("a new conversation")
    elif word == "/save" and rest.strip():
        try:
            write_conversation(session, Path(rest.strip()))
        except (LyceumError, OSError) as error:
            _say(f"error: {error}")
    elif word == "/help":
        _say(COMMANDS)
    else:
        known = ["/reset", "/save", "/help", "/quit"]
        _say("write /save FILE" if word == "/save" else f"there is no command {word}; {did_you_mean(word, known)}")
    return True


def answer(session: Session, said: str) -> bool:
    """Print the answer to `said` as it comes.

    Ctrl-C ends it after the piece that is being made, so that the session is left whole; a second one at once.

    Returns:
        True if the answer came to its own end.
    """
    pieces = session.stream(said.encode("utf-8", "replace").decode("utf-8"))  # a terminal may send half a character
    with _interruptible() as interrupted:
        for piece in pieces:
            print(piece.translate(CONTROL), end="", flush=True)
            if interrupted():
                close = getattr(pieces, "close", None)
                if close is not None:
                    close()
                print(" ...", flush=True)
                return False
    print(flush=True)
    return True


@contextmanager
def _interruptible() -> Iterator[Any]:
    """Within the block the first Ctrl-C only makes the yielded function true; the next is a KeyboardInterrupt again."""
    seen: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)


def write_conversation(session: Session, path: Path) -> None:
    """Write the session's conversation as one line of JSON."""
    from lyceum.corpus.records import write_records

    if session.conversation is None:
        _say("nothing has been said yet, so there is nothing to save")
        return
    write_records(path, [session.conversation])
    _say(f"saved {path}")


def _say(text: str) -> None:
    """Something about the conversation, not of it."""
    print(text, file=sys.stderr, flush=True)
