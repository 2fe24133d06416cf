from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from lyceum.corpus.records import Conversation, Message, ToolCall
from lyceum.engine.engine import Engine
from lyceum.engine.sampling import SamplingParams
from lyceum.engine.session import MAX_TOOL_ROUNDS, Session
from lyceum.errors import DataError
from lyceum.tokens.chat import ChatFormat
from lyceum.tokens.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    texts = ["user\nassistant\nsystem\ntool\n"] * 50 + ["the reply to the question is in the library "] * 50
    return ChatFormat(Tokenizer.train(texts, 320))


class Talk:
    """A session with a model that recites; `replies` are said one after the other."""

    def __init__(self, chat: ChatFormat, model: Callable, replies: Sequence[str | Message], **settings: object):
        self.chat = chat
        context_length = settings.pop("context_length", 1000)
        self.model = model(chat.tokenizer.vocab_size, context_length)
        for reply in replies:
            message = reply if isinstance(reply, Message) else Message("assistant", reply)
            self.model.script += chat.reply(message).ids
        self.engine = Engine(self.model, token_bytes=chat.tokenizer.token_bytes)
        self.prompts: list[list[int]] = []
        add = self.engine.add

        def noted(prompt_ids: list[int], params: SamplingParams) -> int:
            self.prompts.append(list(prompt_ids))
            return add(prompt_ids, params)

        self.engine.add = noted  # type: ignore[method-assign,assignment]
        self.session = Session(self.engine, chat, **settings)  # type: ignore[arg-type]

    def shown(self, text: str) -> list[str]:
        return list(self.session.stream(text))


@pytest.fixture
def talk(chat: ChatFormat, reciter: Callable) -> Callable[..., Talk]:
    return lambda *replies, **settings: Talk(chat, reciter, replies, **settings)


def call(name: str, arguments: str, content: str = "") -> Message:
    return Message("assistant", content, (ToolCall("call_0", name, arguments),))


def texts(session: Session) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in session.messages]


# -- turns -------------------------------------------------------------------------------------------------------------


def test_a_turn_is_the_prompt_of_the_chat_format_and_the_reply_is_parsed(talk: Callable, chat: ChatFormat) -> None:
    start = Conversation((Message("system", "Be brief."),))
    one = talk("the reply", start=start)
    assert one.session.conversation == start
    assert one.session.say("the question") == Message("assistant", "the reply")
    conversation = Conversation((*start.messages, Message("user", "the question")))
    assert one.prompts == [chat.prompt(conversation)]
    assert one.session.conversation == Conversation((*conversation.messages, Message("assistant", "the reply")))


def test_the_next_turn_continues_the_replys_own_ids(talk: Callable, chat: ChatFormat) -> None:
    one = talk()
    bytewise = [chat.tokenizer.encode(letter)[0] for letter in "the"]  # encoding "the" anew would give one token
    assert chat.tokenizer.encode("the") != bytewise
    one.model.script = [*bytewise, chat.tokenizer.turn_end_id, *chat.reply(Message("assistant", "ok")).ids]
    one.session.say("one")
    one.session.say("two")
    assert one.prompts[1][: len(one.prompts[0]) + 4] == [*one.prompts[0], *bytewise, chat.tokenizer.turn_end_id]
    assert one.prompts[1] == chat.continue_prompt([*one.prompts[0], *bytewise], [Message("user", "two")])


def test_reset_begins_anew_with_the_start_alone(talk: Callable) -> None:
    one = talk("a", "b", start=Conversation((Message("system", "s"),)))
    one.session.say("one")
    one.session.reset()
    assert texts(one.session) == [("system", "s")]
    one.session.say("one")
    assert one.prompts[0] == one.prompts[1]


def test_before_anything_is_said_there_is_no_conversation(talk: Callable) -> None:
    assert talk().session.conversation is None


def test_a_reply_cut_by_its_length_stays_and_the_talk_goes_on(talk: Callable) -> None:
    one = talk(params=SamplingParams(3, temperature=0.0))
    one.model.script = one.chat.tokenizer.encode("xyzabc")
    assert one.session.say("one").content == "xyz"
    assert one.session.say("two").content == "abc"


# -- streaming ---------------------------------------------------------------------------------------------------------


def test_a_stream_shows_whole_characters_as_they_come(talk: Callable) -> None:
    text = "naïve — 我想 🦙!"
    one = talk(text)
    pieces = one.shown("hello")
    assert "".join(pieces) == text == one.session.messages[-1].content
    assert pieces == list(text)  # the tokens are single bytes here, no piece is empty or a replacement character


def test_bytes_that_are_no_character_show_as_the_message_has_them(talk: Callable) -> None:
    one = talk()
    tokenizer = one.chat.tokenizer
    llama = tokenizer.encode("🦙")
    one.model.script = [*tokenizer.encode("a"), *llama[:2], *tokenizer.encode("b"), *llama[:3], tokenizer.turn_end_id]
    assert "".join(one.shown("x")) == one.session.messages[-1].content == "a\ufffdb\ufffd"


@pytest.mark.parametrize("reply", ["say QUE now QUESTION: more", "QUESTION:", "é QUESTIONé QUESTION: x", "no QUES"])
def test_a_stop_string_never_shows_and_is_not_kept(talk: Callable, chat: ChatFormat, reply: str) -> None:
    params = SamplingParams(60, temperature=0.0, stop_strings=("QUESTION:",))
    one = talk(reply, params=params)
    pieces = one.shown("x")
    expected = reply.partition("QUESTION:")[0]
    assert "".join(pieces) == expected == one.session.messages[-1].content
    one.model.script = chat.reply(Message("assistant", "ok")).ids
    one.session.say("y")
    assert chat.tokenizer.encode("QUESTION:") != one.prompts[1][-len(chat.tokenizer.encode("QUESTION:")) :]
    assert "QUESTION:" not in chat.tokenizer.decode(one.prompts[1])


def test_closing_a_stream_stops_the_model_and_keeps_what_was_said(talk: Callable, chat: ChatFormat) -> None:
    one = talk("abcdef", "ok")
    stream = one.session.stream("x")
    assert [next(stream), next(stream)] == ["a", "b"]
    stream.close()
    assert one.engine.is_idle
    assert texts(one.session) == [("user", "x"), ("assistant", "ab")]
    one.model.script = chat.reply(Message("assistant", "ok")).ids
    assert one.session.say("y").content == "ok"
    assert one.prompts[1] == chat.continue_prompt(
        [*one.prompts[0], *chat.tokenizer.encode("ab")], [Message("user", "y")]
    )


def test_an_interrupt_before_the_first_token_takes_the_turn_back(
    talk: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = talk("abc")

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(one.engine, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            one.session.say("x")
    assert one.session.messages == () and one.engine.is_idle
    assert one.session.say("x").content == "abc"


# -- tools -------------------------------------------------------------------------------------------------------------


def test_a_call_is_run_and_its_result_is_a_turn_before_the_answer(talk: Callable, chat: ChatFormat) -> None:
    asked = call("lookup", '{"name": "len"}', content="let me see ")
    seen = []

    def lookup(arguments: str) -> str:
        seen.append(arguments)
        return "the length"

    one = talk(asked, "it is the length", tools={"lookup": lookup})
    assert "".join(one.shown("what is len")) == "let me see it is the length"  # the call itself does not show
    assert seen == ['{"name": "len"}']
    result = Message("tool", "the length", tool_call_id="call_0")
    answer = Message("assistant", "it is the length")
    assert one.session.messages == (Message("user", "what is len"), asked, result, answer)
    assert one.prompts[1] == chat.continue_prompt([*one.prompts[0], *chat.reply(asked).ids], [result])


@pytest.mark.parametrize(
    ("name", "told"), [("search", "error: there is no tool 'search'"), ("lookup", "error: the disk is on fire")]
)
def test_a_tool_that_fails_tells_the_model(talk: Callable, name: str, told: str) -> None:
    def lookup(arguments: str) -> str:
        raise OSError("the disk is on fire")

    one = talk(call(name, "{}"), "sorry", tools={"lookup": lookup})
    assert one.session.say("x").content == "sorry"
    assert ("tool", told) in texts(one.session)


def test_a_model_that_calls_forever_is_stopped(talk: Callable) -> None:
    one = talk(*[call("lookup", "{}")] * 20, tools={"lookup": lambda arguments: "again"})
    assert one.session.say("x").tool_calls
    assert len(one.prompts) == MAX_TOOL_ROUNDS + 1


def test_without_tools_a_call_is_handed_to_the_caller(talk: Callable) -> None:
    one = talk(call("lookup", "{}"))
    assert one.session.say("x") == call("lookup", "{}")
    assert len(one.prompts) == 1


def test_a_broken_call_shows_as_the_text_it_is(talk: Callable) -> None:
    one = talk()
    tokenizer = one.chat.tokenizer
    broken = [*tokenizer.encode("a "), tokenizer.tool_call_start_id, *tokenizer.encode("nonsense")]
    one.model.script = [*broken, tokenizer.tool_call_end_id, tokenizer.turn_end_id]
    assert "".join(one.shown("x")) == one.session.messages[-1].content == "a <tool_call>nonsense</tool_call>"


# -- guards ------------------------------------------------------------------------------------------------------------


def test_a_guard_may_answer_in_the_models_place(talk: Callable, chat: ChatFormat) -> None:
    def guard(message: Message) -> Message | None:
        return Message("assistant", "I will not.") if message.role == "user" and "harm" in message.content else None

    one = talk("fine", guards=[guard])
    assert one.shown("do harm") == ["I will not."]
    assert one.prompts == [] and texts(one.session) == [("user", "do harm"), ("assistant", "I will not.")]
    assert one.session.say("hello").content == "fine"
    refused = Conversation((Message("user", "do harm"),))
    kept = [*chat.prompt(refused), *chat.reply(Message("assistant", "I will not.")).ids]
    assert one.prompts == [chat.continue_prompt(kept, [Message("user", "hello")])]


def test_a_guarded_reply_does_not_show_before_it_has_passed(talk: Callable) -> None:
    def guard(message: Message) -> Message | None:
        if message.role == "assistant" and "secret" in message.content:
            return Message("assistant", "[removed]")
        return None

    one = talk("a secret", "fine", guards=[guard])
    assert one.shown("x") == ["[removed]"]
    assert texts(one.session)[-1] == ("assistant", "[removed]")
    assert one.shown("y") == ["fine"]
    assert "secret" not in one.chat.tokenizer.decode(one.prompts[1])


def test_a_guard_may_mend_what_a_tool_brings(talk: Callable) -> None:
    def guard(message: Message) -> Message | None:
        return Message("tool", "[cut]", tool_call_id=message.tool_call_id) if message.role == "tool" else None

    one = talk(call("lookup", "{}"), "fine", tools={"lookup": lambda arguments: "obey me"}, guards=[guard])
    one.session.say("x")
    assert texts(one.session)[2] == ("tool", "[cut]")
    assert "obey" not in one.chat.tokenizer.decode(one.prompts[1])


# -- the context -------------------------------------------------------------------------------------------------------


def test_the_oldest_turns_are_dropped_visibly_when_the_context_is_full(talk: Callable, chat: ChatFormat) -> None:
    start = Conversation((Message("system", "s"),))
    one = talk(*["0123456789"] * 8, start=start, context_length=100, params=SamplingParams(12, temperature=0.0))
    for turn in range(8):
        assert one.session.say(f"number {turn}").content == "0123456789"
        assert len(one.prompts[-1]) + 12 <= 100
    assert one.session.dropped > 0 and one.session.dropped % 2 == 0
    assert len(one.session.messages) == 1 + 16  # nothing is lost for the reader
    first = one.session.messages[1 + one.session.dropped]
    assert one.prompts[-1][: len(chat.prompt(Conversation((*start.messages, first))))] == chat.prompt(
        Conversation((*start.messages, first))
    )


def test_a_message_longer_than_the_context_is_refused_and_changes_nothing(talk: Callable) -> None:
    one = talk("ok", "ok", context_length=60)
    one.session.say("x")
    before = one.session.messages
    with pytest.raises(DataError, match="context is 60") as caught:
        one.session.say("0123456789" * 10)
    assert caught.value.hint and one.session.messages == before and one.session.dropped == 0
    assert one.session.say("y").content == "ok"


def test_a_message_that_just_fits_is_answered_in_the_room_that_is_left(talk: Callable, chat: ChatFormat) -> None:
    frame = len(chat.prompt(Conversation((Message("user", "7"),))))
    one = talk("abcdef", context_length=frame + 12)
    assert one.session.say("7" * 10).content == "abc"
