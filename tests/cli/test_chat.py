"""The terminal chat, with a made-up session: what opens it, what Ctrl-C does, what is saved, which model is chosen."""

from __future__ import annotations

import builtins
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lyceum.cli import chat
from lyceum.cli.chat import Choice, find_about, find_checkpoint, opening
from lyceum.corpus.records import Conversation, Message, read_conversations
from lyceum.errors import CheckpointError, DataError, RunError, UsageError
from lyceum.run import StageFolder, State, write_json, write_state

INTERRUPT = object()


class Session:
    """Stands in for a session: says the prepared pieces, and keeps the conversation as the real one does."""

    def __init__(self, *pieces: Any) -> None:
        self.pieces = pieces
        self.messages: list[Message] = []
        self.dropped = 0
        self.closed = False

    @property
    def conversation(self) -> Conversation | None:
        return Conversation(tuple(self.messages)) if self.messages else None

    def reset(self) -> None:
        self.messages.clear()

    def stream(self, text: str) -> Iterator[str]:
        said = []
        self.messages.append(Message("user", text))
        try:
            for piece in self.pieces:
                if piece is INTERRUPT:
                    os.kill(os.getpid(), signal.SIGINT)
                    continue
                if isinstance(piece, Exception):
                    raise piece
                said.append(piece)
                yield piece
        except GeneratorExit:
            self.closed = True
            raise
        finally:
            self.messages.append(Message("assistant", "".join(said)))


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Prepare what the person types; an exception is raised in place of a line; after the last comes Ctrl-D."""

    def prepare(*lines: Any) -> None:
        waiting = [*lines, EOFError()]

        def read(prompt: str) -> str:
            line = waiting.pop(0)
            if isinstance(line, BaseException):
                raise line
            return str(line)

        monkeypatch.setattr(builtins, "input", read)

    return prepare


# -------------------------------------------------------------------------------- the conversation


def test_an_answer_is_streamed_and_the_conversation_kept(say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    session = Session("Returns ", "the length.")
    say("What does len do?", "", "  and sorted?  ")
    chat.converse(session)  # type: ignore[arg-type]
    assert capsys.readouterr().out == "Returns the length.\nReturns the length.\n\n"
    assert [(m.role, m.content) for m in session.messages] == [
        ("user", "What does len do?"),
        ("assistant", "Returns the length."),
        ("user", "and sorted?"),
        ("assistant", "Returns the length."),
    ]


def test_ctrl_c_stops_the_answer_and_not_the_program(say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    session = Session("one", INTERRUPT, " two", " three")
    before = signal.getsignal(signal.SIGINT)
    say("count", "/reset")
    chat.converse(session)  # type: ignore[arg-type]
    shown = capsys.readouterr()
    assert shown.out == "one two ...\n\n"
    assert "a new conversation" in shown.err  # it went on
    assert session.closed and signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_stops_even_a_piece_that_does_not_come(say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    session = Session("one", INTERRUPT, INTERRUPT, "never")
    say("count", "/help")
    chat.converse(session)  # type: ignore[arg-type]
    shown = capsys.readouterr()
    assert shown.out == "one\n\n"
    assert "/save FILE" in shown.err


def test_ctrl_c_twice_at_the_prompt_leaves_and_once_does_not(say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    session = Session("yes")
    say(KeyboardInterrupt(), "still there?", KeyboardInterrupt(), KeyboardInterrupt(), "not heard")
    chat.converse(session)  # type: ignore[arg-type]
    assert [m.content for m in session.messages] == ["still there?", "yes"]
    assert capsys.readouterr().err.count("Ctrl-C again leaves") == 2


def test_commands_reset_save_help_and_quit(say: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = Session("é")
    file = tmp_path / "talk.jsonl"
    say("/save x", "hi", f"/save {file}", "/reset", "/save", "/sav", "/help", "/quit", "not heard")
    chat.converse(session)  # type: ignore[arg-type]
    kept = list(read_conversations(file))
    assert [[(m.role, m.content) for m in row.messages] for row in kept] == [[("user", "hi"), ("assistant", "é")]]
    assert session.messages == []
    shown = capsys.readouterr().err
    for line in ("nothing to save", f"saved {file}", "a new conversation", "write /save FILE", "did you mean '/save'?"):
        assert line in shown


def test_an_error_in_an_answer_is_said_and_the_chat_goes_on(say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    session = Session(DataError("the message does not fit", hint="write a shorter one"))
    say("x" * 10, "/help")
    chat.converse(session)  # type: ignore[arg-type]
    shown = capsys.readouterr().err
    assert "error: the message does not fit\nhint: write a shorter one" in shown and "/reset" in shown


def test_a_folder_that_cannot_be_written_is_said_and_the_chat_goes_on(
    say: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    say("hi", f"/save {tmp_path / 'file' / 'talk.jsonl'}", "/help")
    chat.converse(Session("ho"))  # type: ignore[arg-type]
    shown = capsys.readouterr().err
    assert "error:" in shown and "/reset" in shown


def test_dropped_messages_are_told_once(say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    session = Session("a")
    session.dropped = 2
    say("one", "two")
    chat.converse(session)  # type: ignore[arg-type]
    assert capsys.readouterr().err.count("the first 2 messages no longer fit") == 1


def test_what_would_drive_the_terminal_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.answer(Session("a\x1b[2Jb\r\x9bc\n\td"), "half a character: \udce9")  # type: ignore[arg-type]
    assert capsys.readouterr().out == "a\ufffd[2Jb\ufffd\ufffdc\n\td\n"


def test_a_prompt_is_answered_once_with_nothing_else_on_the_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    session = Session("It ", "sorts.")
    asked: list[Any] = []

    def opened(choice: Choice, temperature: float, max_tokens: int, packages: Any) -> Any:
        asked.extend((choice.checkpoint, temperature, max_tokens))
        return session, {}

    monkeypatch.setattr(chat, "open_session", opened)
    chat.chat(tmp_path, prompt="What does sorted do?", temperature=0.5, save=str(tmp_path / "talk.jsonl"))
    assert capsys.readouterr().out == "It sorts.\n"
    assert asked == [tmp_path, 0.5, 256]
    assert len(list(read_conversations(tmp_path / "talk.jsonl"))) == 1


@pytest.mark.parametrize("option", [{"temperature": -1.0}, {"max_tokens": 0}])
def test_options_that_make_no_answer_are_refused(tmp_path: Path, option: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="make no answer"):
        chat.chat(tmp_path, **option)


# -------------------------------------------------------------------------------- what it says of itself

ABOUT = {"studied": "500 functions", "cannot": "It knows nothing else.", "ask": ["a?", "b?", "c?"]}


def test_the_chat_opens_with_what_was_studied_and_three_questions() -> None:
    text = opening(ABOUT)
    assert text.startswith("It studied 500 functions.\nIt knows nothing else.\n")
    assert all(f"\n  {question}\n" in text for question in ABOUT["ask"])
    assert opening({}) == "/help shows the commands; Ctrl-C stops an answer, Ctrl-D leaves."


def test_the_chat_says_where_names_may_be_looked_up() -> None:
    assert "\nIt may look up what belongs to stdlib, numpy: ask by" in opening(ABOUT, ["stdlib", "numpy"])
    assert "look up" not in opening(ABOUT)


def test_the_checkpoint_says_what_was_studied_else_the_runs_lessons_do(tmp_path: Path) -> None:
    choice = Choice(tmp_path / "ppo" / "checkpoint", "")
    assert find_about(choice, {"about": ABOUT}) == ABOUT
    assert find_about(choice, {}) == {}
    for name, report in (("corpus", "not JSON"), ("eval", "[]"), ("lessons", json.dumps({"about": ABOUT}))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(report)
    assert find_about(choice, {"about": None}) == ABOUT


# -------------------------------------------------------------------------------- which model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder whose pretrain, sft and gentle sections are finished and whose ppo is not."""
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "recipe.toml").write_text("[pretrain]\n[sft]\n[sft.gentle]\n[reward]\n[ppo]\n")
    for name in ("pretrain", "sft", "gentle", "reward", "ppo"):
        section = StageFolder(folder / name)
        section.path.mkdir()
        if name != "ppo":
            section.checkpoint.mkdir()
        write_state(section, State("k", name, {}, {}, finished=name != "ppo"))
    return folder


def test_of_a_run_the_most_schooled_finished_model_talks_and_says_why(run: Path) -> None:
    choice = find_checkpoint(run)
    assert (choice.checkpoint, choice.kind) == (run / "gentle" / "checkpoint", "sft")
    assert "stage gentle, since ppo is not finished" in choice.words
    (run / "ppo" / "checkpoint").mkdir()
    write_state(StageFolder(run / "ppo"), State("k", "ppo", {}, {}, finished=True))
    choice = find_checkpoint(run)
    assert choice.checkpoint == run / "ppo" / "checkpoint"
    assert choice.words == f"the model of stage ppo ({choice.checkpoint})"


def test_a_model_from_before_the_recipe_changed_is_passed_over_aloud(run: Path) -> None:
    write_json(run / "manifest.json", {"keys": {"pretrain": "k", "sft": "k", "gentle": "another", "ppo": "another"}})
    choice = find_checkpoint(run)
    assert choice.checkpoint == run / "sft" / "checkpoint"
    assert "since ppo is not finished and gentle is from before the recipe changed" in choice.words
    assert find_checkpoint(run, "gentle").checkpoint == run / "gentle" / "checkpoint"


def test_the_stage_can_be_chosen(run: Path) -> None:
    assert find_checkpoint(run, "sft").checkpoint == run / "gentle" / "checkpoint"
    assert find_checkpoint(run, "pretrain").checkpoint == run / "pretrain" / "checkpoint"
    with pytest.raises(RunError, match="ppo of .* has no checkpoint"):
        find_checkpoint(run, "ppo")
    with pytest.raises(UsageError, match="no stage 'sftt'") as caught:
        find_checkpoint(run, "sftt")
    assert "did you mean 'sft'?" in caught.value.hint


def test_a_section_and_a_checkpoint_are_taken_as_they_are(run: Path, tmp_path: Path) -> None:
    assert find_checkpoint(run / "sft").checkpoint == run / "sft" / "checkpoint"
    (run / "sft" / "checkpoint" / "config.json").write_text("{}")
    assert find_checkpoint(run / "sft" / "checkpoint").checkpoint == run / "sft" / "checkpoint"
    with pytest.raises(UsageError, match="has no stage"):
        find_checkpoint(run / "sft", "sft")


def test_what_is_no_run_and_no_checkpoint_is_said(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="no run or checkpoint") as caught:
        find_checkpoint(tmp_path / "nothing")
    assert "lyceum run demo" in caught.value.hint
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither a run nor a checkpoint"):
        find_checkpoint(tmp_path / "empty")
    (tmp_path / "runs").mkdir()
    run.rename(tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError) as caught:
        find_checkpoint(Path("demo"))
    assert caught.value.hint == "did you mean runs/demo?"
    for name in ("pretrain", "sft", "gentle"):
        (tmp_path / "runs" / "demo" / name / "state.json").unlink()
    with pytest.raises(RunError, match="no stage of runs/demo can talk: ppo is not finished; gentle is not finished"):
        find_checkpoint(Path("runs/demo"))


# -------------------------------------------------------------------------------- with a real model


def test_a_real_checkpoint_answers_greedily_and_a_reward_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from lyceum.model.checkpoint import save_checkpoint
    from lyceum.model.heads import ScoreModel
    from lyceum.model.spec import ModelSpec
    from lyceum.model.transformer import Decoder
    from lyceum.tokens.tokenizer import Tokenizer

    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["What does len do? It returns the length. " * 20], 300)
    spec = ModelSpec(tokenizer.vocab_size, 2, 32, 2, 1, 16, 64, 256)
    save_checkpoint(tmp_path / "policy", Decoder(spec), tokenizer, {"stage": "sft", "about": ABOUT})
    save_checkpoint(tmp_path / "reward", ScoreModel(Decoder(spec)), tokenizer, {})
    capsys.readouterr()
    said = []
    for _ in range(2):
        chat.chat(tmp_path / "policy", prompt="What does len do?", max_tokens=8, save=str(tmp_path / "talk.jsonl"))
        said.append(capsys.readouterr().out)
        kept = next(read_conversations(tmp_path / "talk.jsonl"))
        assert [message.role for message in kept.messages] == ["user", "assistant"]
    assert said[0] == said[1]
    session, _ = chat.open_session(Choice(tmp_path / "policy", ""), 0.0, 8, ["textwrap"])
    assert session.tools["lookup"]('{"name": "textwrap.fill"}').startswith("Fill a single paragraph of text")
    session.say("hi")
    assert session.conversation is not None and session.conversation.tools[0]["function"]["name"] == "lookup"
    with pytest.raises(DataError, match="no_such_package"):
        chat.chat(tmp_path / "policy", prompt="hi", lookup=["no_such_package"])
    with pytest.raises(CheckpointError, match="gives scores, not text"):
        chat.chat(tmp_path / "reward", prompt="hi")
