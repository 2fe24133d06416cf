"""The search: terms by hand, and the same answers from both databases."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lyceum.serve.store import Store
from lyceum.serve.terms import LONGEST_WORD, SEARCHED, phrases_of, terms_of


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("GPT模型好", ["gpt", "模型", "型好", "好"]),
        ("Hello, World!", ["hello", "world"]),
        ("Café ＡＢＣ", ["cafe", "abc"]),
        ("os.path_join", ["os", "path", "join"]),
        ("東京タワー", ["東京", "京タ", "タワ", "ワー", "ー"]),
        ("한국어", ["한국", "국어", "어"]),
        ("हिन्दी", ["हिन्दी"]),
        ("İstanbul STRASSE straße", ["istanbul", "strasse", "strasse"]),
        ("'\"*()^:-+\\ \0 \u202e", []),
        ("", []),
    ],
)
def test_the_terms_of_a_text_by_hand(text: str, terms: list[str]) -> None:
    assert terms_of(text) == terms


def test_a_query_is_phrases_whose_last_word_may_go_on() -> None:
    assert phrases_of("os.path 模型") == [["os", "path"], ["模型"]]
    assert phrases_of("人工智能") == [["人工", "工智", "智能"]]
    assert phrases_of("能") == [["能"]] and phrases_of("模型GPT") == [["模型", "型", "gpt"]]
    assert phrases_of(' "* ') == []
    assert sum(map(len, phrases_of("a " * 1000))) == 64


@given(st.text(st.sampled_from("人工智能模型ab "), min_size=1, max_size=12), st.data())
@settings(max_examples=100)
def test_every_piece_of_a_chinese_text_is_found_in_its_terms(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    piece = text[start : data.draw(st.integers(start + 1, len(text)))]
    if any(
        a.isascii() and b.isascii() and a + b != a + " " for a, b in zip(text[start - 1 : start], piece, strict=False)
    ):
        return  # from the middle of a word on: not found, as everywhere
    terms = " ".join(["", *terms_of(text)])
    for phrase in phrases_of(piece):
        assert " " + " ".join(phrase) in terms  # a row of terms, of which the last may go on


TEXTS = ["今天天气很好，我们去公园吧。", "人工智能模型的训练", "The GPT模型 is fine", "Naïve café prices", "a.b_c(d)"]


@pytest.fixture
def full(store: Store) -> Store:
    """Alice's five texts, each in a conversation of its own; bob has the same."""
    for owner in ("alice", "bob"):
        for text in TEXTS:
            chat = store.new(owner, title=f"about {text[:2]}")
            store.say(owner, chat.id, None, "user", text)
    return store


FOUND = {  # query -> which of the texts, the newest first
    "天气": [0],
    "公园": [0],
    "园吧": [0],
    "气": [0],
    "吧": [0],
    "气天": [],
    "模型": [2, 1],
    "智能模型": [1],
    "gpt模型": [2],
    "模型 fine": [2],
    "NAIVE caf": [3],
    "café": [3],
    "afe": [],
    "b_c": [4],
    "prices cafe": [3],
    '"a.b': [4],
    "'; DROP TABLE messages; --": [],
    '" OR owner:': [],
    "NEAR(naive cafe)": [],
    "*": [],
    "\0": [],
}


def test_both_databases_find_what_was_worked_out_by_hand(full: Store) -> None:
    said = {m.id: m.content for about in full.latest("alice") for m in full.thread("alice", about.id).messages}
    for query, expected in FOUND.items():
        hits = [TEXTS.index(said[hit.message]) for hit in full.search("alice", query) if hit.message is not None]
        assert hits == expected, query
        assert full.search("carol", query) == []


def test_titles_are_found_and_pages_follow_each_other(full: Store) -> None:
    assert [hit.text for hit in full.search("alice", "about 今天")] == ["about 今天"]
    chat = full.new("alice")
    for number in range(7):
        full.say("alice", chat.id, None, "user", f"zebra {number}")
    first = full.search("alice", "zeb", limit=3)
    second = full.search("alice", "zeb", limit=3, before=first[-1].cursor)
    third = full.search("alice", "zeb", limit=3, before=second[-1].cursor)
    assert [hit.text for hit in first + second + third] == [f"zebra {number}" for number in range(6, -1, -1)]


def test_changed_and_deleted_texts_are_not_found_any_more(full: Store) -> None:
    (hit,) = (hit for hit in full.search("alice", "天气") if hit.message)
    full.rewrite("alice", hit.message or "", "Regen")
    full.change("alice", hit.conversation, title="Wetter")
    assert full.search("alice", "天气") == [] == full.search("alice", "今天")
    assert len(full.search("alice", "regen")) == len(full.search("alice", "wetter")) == 1
    full.delete_message("alice", hit.message or "")
    assert full.search("alice", "regen") == []
    full.delete("alice", hit.conversation)
    assert full.search("alice", "wetter") == []
    assert len(full.search("bob", "天气")) == 1


@pytest.mark.parametrize("text", ["x" * 300_000, "\u6c34" * 300_000, "word " * 100_000, "a1-" * 100_000])
def test_a_very_long_text_is_indexed_by_its_beginning(store: Store, text: str) -> None:
    chat = store.new("alice")
    said = store.say("alice", chat.id, None, "user", text + " omega")
    assert [hit.message for hit in store.search("alice", text[:8])] == [said.id]
    assert store.search("alice", "omega") == [] and len(text) > SEARCHED
    assert store.thread("alice", chat.id).messages[0].content == text + " omega"
    assert len(terms_of(text)[0]) <= LONGEST_WORD
