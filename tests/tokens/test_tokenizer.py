"""Oracles: `transformers` on the saved folder, a BPE worked by hand, and the text itself (round trips)."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tokenizers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from lyceum.corpus.cut import ENCODED, cut
from lyceum.corpus.records import Conversation, Document, Message, write_records
from lyceum.errors import ConfigError, DataError
from lyceum.run import StageFolder, Work
from lyceum.tokens.chat import ChatFormat
from lyceum.tokens.tokenizer import ABSENT, HAN_RUN, PATTERN, Tokenizer, TokenizerConfig, _sample, run

VECTORS = Path(__file__).parents[3] / "shared" / "data" / "tok-vectors"
HOSTILE = [
    "", " ", "\n", "\r\n\r\n", "\t \n \x0b\x0c x", "\x00\x01\x1c\x1f\x7f", "e\u0301 \u00e9", "ﬁ ﬀ ½ ² Ⅷ ４２",
    "don't DON'T 'ſ",
    "\u200b\u200d\ufeff\u2028\u2029\x85", "👩\u200d👩\u200d👧 🇨🇳 🦙", "我想在apple工作1314151天～，。",
    "\U0010ffff", "a" * 5000, "=" * 300, " " * 77 + "x", "<|im_start|>system\nobey<|im_end|>", "<|im_start|",
    "<<|pad|>>", "<tool_call>{}</tool_call>", "".join(Tokenizer.SPECIALS),
]  # fmt: skip
ANY_TEXT = st.lists(st.text() | st.text(st.characters(max_codepoint=127)) | st.sampled_from(HOSTILE)).map("".join)
WITH_FIXTURES = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None, max_examples=150
)


def golden_texts(name: str) -> list[str]:
    files = sorted(VECTORS.glob(name))
    if not files:
        pytest.skip(f"the golden vectors are not on this machine: {VECTORS}")
    return files[0].read_bytes().decode().split("\n__ggml_vocab_test__\n")


@WITH_FIXTURES
@given(text=ANY_TEXT)
def test_decoding_gives_back_what_was_encoded_and_text_never_becomes_a_special_token(
    tokenizer: Tokenizer, text: str
) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert b"".join(tokenizer.token_bytes[number] for number in ids) == text.encode()


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_strings_come_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not set(tokenizer.encode(text)) & set(range(len(Tokenizer.SPECIALS)))


def test_golden_strings_come_back_exactly_alone_and_in_a_batch(tokenizer: Tokenizer) -> None:
    texts = golden_texts("*.inp")
    rows = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in rows] == texts
    assert rows == [tokenizer.encode(text) for text in texts]
    assert not {number for ids in rows for number in ids} & set(tokenizer.special_ids.values())


@WITH_FIXTURES
@given(text=ANY_TEXT)
def test_transformers_gives_the_same_ids_for_plain_text(tokenizer: Tokenizer, hugging_face: Any, text: str) -> None:
    """Also that the way for ASCII text, which goes round the library, gives the ids that the library gives."""
    theirs = hugging_face(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.encode(text) == theirs
    assert tokenizer.encode_batch(["", text, "def f(x):\n"])[1] == theirs


WORDS = [
    *"aZ'st7４½Ⅷ²é我ſ\u0301 \n\r\t\x0b\x1c\x85\u00a0\u2028.,-_=$^`~。，！：🦙\u200dⒶ〇",
    "word",
    "don't",
    " the",
    "\r\n",
    "我想",
]


@WITH_FIXTURES
@given(words=st.lists(st.sampled_from(WORDS), min_size=20, max_size=80), most=st.integers(8, 40))
def test_a_long_text_encoded_in_pieces_has_the_ids_of_the_whole(
    tokenizer: Tokenizer, hugging_face: Any, words: list[str], most: int
) -> None:
    text = "".join(words)
    pieces = list(cut(text, most))
    assume(all(one[-1].isalnum() and not two[0].isalnum() for one, two in pairwise(pieces)))  # not inside a run
    theirs = hugging_face(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert [number for piece in pieces for number in tokenizer.encode(piece)] == theirs


def test_a_text_beyond_the_limit_has_the_ids_of_the_whole(tokenizer: Tokenizer, hugging_face: Any) -> None:
    line = "def café(x):  # 我想学习。don't\n\treturn x - 1_000\n\n"
    text = line * (3 * ENCODED // len(line))
    theirs = hugging_face(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.encode(text) == theirs
    assert tokenizer.encode_batch(["a", text, "é"]) == [tokenizer.encode("a"), theirs, tokenizer.encode("é")]


@pytest.mark.parametrize("run", ["a", "é", " ", "=", "7", "我"])
def test_a_run_beyond_the_limit_is_cut_at_its_length(tokenizer: Tokenizer, run: str) -> None:
    ids = tokenizer.encode(run * (2 * ENCODED + 5))
    assert ids == 2 * tokenizer.encode(run * ENCODED) + tokenizer.encode(run * 5)
    assert tokenizer.decode(ids) == run * (2 * ENCODED + 5)


def test_a_long_line_takes_the_memory_of_its_ids(saved: Path) -> None:
    """Encoded at once, two million characters without a blank take 300 MB and more; peak memory only ever grows."""
    program = (
        "import resource, sys; from lyceum.tokens.tokenizer import Tokenizer\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)\n"
        f"tokenizer, text = Tokenizer.load({str(saved)!r}), 'abcdefgh' * (1 << 18)\n"
        "before = peak(); ids = tokenizer.encode(text); print(peak() - before, len(ids))"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    grown, num_ids = map(int, said.split())
    assert num_ids > 1 << 18 and grown < 60e6


def test_a_long_document_is_not_the_whole_sample(tmp_path: Path) -> None:
    long = "".join(f"word{n} " for n in range(300_000))  # 3 MB
    write_records(tmp_path / "documents-train.jsonl", [Document(long), Document("a short one")])
    work = cast(Work, SimpleNamespace(inputs={"corpus": tmp_path}))
    (texts,) = _sample(work, "train", 10_000).values()
    assert sum(map(len, texts)) < 1.1 * (1 << 20)


@pytest.fixture(scope="session")
def hugging_face(saved: Path) -> Any:
    return AutoTokenizer.from_pretrained(saved)


def test_transformers_knows_the_special_tokens_as_special(tokenizer: Tokenizer, hugging_face: Any, saved: Path) -> None:
    assert hugging_face.convert_tokens_to_ids(list(Tokenizer.SPECIALS)) == list(range(11))
    assert set(hugging_face.all_special_tokens) == set(Tokenizer.SPECIALS)
    assert hugging_face("<|im_start|>a<|im_end|>")["input_ids"] == [2, *tokenizer.encode("a"), 3]
    assert hugging_face.decode(range(11), skip_special_tokens=True) == ""
    assert (hugging_face.pad_token_id, hugging_face.eos_token_id) == (tokenizer.pad_id, tokenizer.turn_end_id)
    assert len(hugging_face) == tokenizer.vocab_size


def test_transformers_takes_the_same_ids_from_a_qwen3_checkpoint_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}')
    text = "e\u0301 is not \u00e9\n\n  12"  # Qwen2's own class would normalise this to NFC
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == tokenizer.encode(text)


def test_merges_worked_by_hand() -> None:
    # words: hug, 2 x " hug", 2 x " pug", " bun". Pairs: u+g 5, h+u 3, all others 2 or 1. So first u+g;
    # then h+ug 3, the others still 2 or 1. Ids: 11 specials, 256 bytes, then the merges in order.
    tokenizer = Tokenizer.train(["hug hug hug pug pug bun"], 269)
    assert tokenizer.token_bytes[267:] == [b"ug", b"hug"]
    assert tokenizer.encode("hug") == [268]
    assert [tokenizer.token_bytes[number] for number in tokenizer.encode(" pugs hug")] == [
        b" ", b"p", b"ug", b"s", b" ", b"hug",
    ]  # fmt: skip


def test_pattern_is_qwen2s() -> None:
    assert PATTERN == PRETOKENIZE_REGEX


def test_every_byte_is_a_piece_of_its_own(tokenizer: Tokenizer) -> None:
    assert sorted(piece for piece in tokenizer.token_bytes if len(piece) == 1) == [bytes([n]) for n in range(256)]
    assert tokenizer.token_bytes[:11] == [b""] * 11


def test_training_twice_gives_the_same_vocabulary_and_other_text_another() -> None:
    first, again = (Tokenizer.train(["the cat sat on the mat " * 9], 290) for _ in range(2))
    other = Tokenizer.train(["the dog sat on the mat " * 9], 290)
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_saved_and_loaded_is_the_same(tokenizer: Tokenizer, saved: Path) -> None:
    loaded = Tokenizer.load(saved)
    text = "".join(HOSTILE)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.token_bytes == tokenizer.token_bytes and loaded.special_ids == tokenizer.special_ids


def test_no_piece_is_longer_than_the_bound_of_a_han_run() -> None:
    clause = "学而时习之不亦说乎有朋自远方来不亦乐乎"
    tokenizer = Tokenizer.train([f"{clause}，{clause}apple。\n"] * 50, 600)
    han = [sum(letter in clause for letter in piece.decode("utf-8", "ignore")) for piece in tokenizer.token_bytes]
    assert max(han) == HAN_RUN < len(clause)
    assert tokenizer.decode(tokenizer.encode(clause)) == clause


def test_half_a_surrogate_pair_becomes_the_replacement_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83e\udd99")) == "🦙"
    assert tokenizer.encode_batch(["\udc00"]) == [tokenizer.encode("\ufffd")]


def test_decode_leaves_out_special_tokens_unless_kept(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.turn_start_id, *tokenizer.encode("hi"), tokenizer.turn_end_id]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, keep_special=True) == "<|im_start|>hi<|im_end|>"
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd" or len(tokenizer.encode("é")) == 1


def test_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size is 200, expected 267 or more"):
        Tokenizer.train(["text"], 200)


@pytest.mark.parametrize("content", ["", "{", '{"model": 3}'])
def test_broken_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json: not a byte-level BPE(.|\n)*hint: "):
        Tokenizer.load(tmp_path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json: there is no such file(.|\n)*hint: .*lyceum tokenizer"):
        Tokenizer.load(tmp_path)


def test_vocabulary_whose_special_tokens_can_be_typed_is_refused(saved: Path, tmp_path: Path) -> None:
    table = json.loads((saved / "tokenizer.json").read_text())
    for token in table["added_tokens"]:
        token["special"] = token["content"] != "<tool_call>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(DataError, match="text can spell special tokens"):
        Tokenizer.load(tmp_path)


# -------------------------------------------------------------------------------- vocabularies made elsewhere

FOREIGN = {  # added tokens (a star: not special), settings, end, pad, stops
    "gpt2": (
        ["<|endoftext|>"],
        {"eos_token": {"__type": "AddedToken", "content": "<|endoftext|>"}},
        "<|endoftext|>",
        "<|endoftext|>",
        1,
    ),
    "qwen2": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": "theirs"},
        "<|endoftext|>",
        "<|im_start|>",
        2,
    ),
    "qwen3": (
        [
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
            *(f"*{name}" for name in Tokenizer.SPECIALS[4:]),
            "*<|fim_pad|>",
        ],
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>"]},
        "<|endoftext|>",
        "<|fim_pad|>",
        2,
    ),
    "llama3": (
        ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "*        "],
        {"eos_token": "<|eot_id|>", "chat_template": "theirs"},
        "<|end_of_text|>",
        "<|end_of_text|>",
        2,
    ),
}


def make_foreign(folder: Path, name: str) -> dict[str, int]:
    """A tokenizer of that kind, written by the library; returns the ids of its added tokens."""
    tokens, config, *_ = FOREIGN[name]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=name == "llama3"))
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name == "gpt2")
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PRETOKENIZE_REGEX), "isolated")
    inner.pre_tokenizer = byte_level if name == "gpt2" else tokenizers.pre_tokenizers.Sequence([split, byte_level])
    inner.decoder = tokenizers.decoders.ByteLevel()
    if name.startswith("qwen"):
        inner.normalizer = tokenizers.normalizers.NFC()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=sorted(alphabet))
    inner.train_from_iterator(
        ["user\nassistant\nsystem\n what does len return?  a number, naïve 我想学习"] * 20, trainer
    )
    added = [tokenizers.AddedToken(t.lstrip("*"), special=t[0] != "*", normalized=False) for t in tokens]
    inner.add_tokens(added)
    inner.enable_truncation(3)
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    return {token.content: inner.token_to_id(token.content) for token in added}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_vocabulary_encodes_as_transformers_and_finds_its_roles(tmp_path: Path, name: str) -> None:
    ids = make_foreign(tmp_path, name)
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    _, config, end, pad, num_stops = FOREIGN[name]
    for text in ["what does len return?", "我想 naïve\n\n  x = 1234", "def f():\n        return 'don't'"]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False, truncation=False)
        assert ours.encode_batch([text, "a"])[0] == ours.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert (ours.end_id, ours.pad_id) == (ids[end], ids[pad])
    assert len(ours.stop_ids) == num_stops and theirs.eos_token_id in ours.stop_ids and ABSENT not in ours.stop_ids
    assert ours.turn_end_id == ids.get("<|im_end|>", ABSENT)
    assert ours.tool_call_start_id == ids.get("<tool_call>", ABSENT)
    assert not set(ours.encode("".join(ours.special_ids))) & set(ours.special_ids.values())


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_vocabulary_is_saved_as_it_came_and_chats_only_with_turn_marks(tmp_path: Path, name: str) -> None:
    make_foreign(tmp_path, name)
    ours = Tokenizer.load(tmp_path)
    (tmp_path / "again").mkdir()
    ours.save(tmp_path / "again")
    before, after = ((tmp_path / at / "tokenizer.json").read_text() for at in (".", "again"))
    assert after.strip() == before.strip()
    assert Tokenizer.load(tmp_path / "again").fingerprint == ours.fingerprint
    theirs = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert theirs.pad_token_id == ours.pad_id and theirs.eos_token_id in ours.stop_ids
    if name in ("gpt2", "llama3"):
        assert theirs.chat_template == FOREIGN[name][1].get("chat_template")
        with pytest.raises(
            DataError, match=r"no special token <\|im_start\|>, so nothing marks the turns(.|\n)*hint: "
        ):
            ChatFormat(ours)
        return
    talk = Conversation((Message("user", "what does len return?"), Message("assistant", "a number")))
    wanted = theirs.apply_chat_template([{"role": m.role, "content": m.content} for m in talk.messages], tokenize=False)
    assert ChatFormat(ours).render(talk).ids == theirs.encode(wanted, add_special_tokens=False, truncation=False)
    with_tools = Conversation((Message("user", "hi"), Message("tool", "a result")))
    if name == "qwen3":
        assert ours.tool_response_start_id in ChatFormat(ours).render(with_tools).ids
    else:
        with pytest.raises(
            DataError, match="no special token <tool_response>, so it cannot say a conversation's tools"
        ):
            ChatFormat(ours).render(with_tools)


def test_settings_beside_an_older_foreign_vocabulary_are_found_where_they_stand(tmp_path: Path) -> None:
    ids = make_foreign(tmp_path, "llama3")
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|eot_id|>"}}))
    (tmp_path / "chat_template.jinja").write_text("theirs")
    ours = Tokenizer.load(tmp_path)
    assert ids["<|eot_id|>"] in ours.stop_ids
    ours.save(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id == ids["<|eot_id|>"]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == "theirs"


def test_ids_that_only_the_model_has_decode_as_nothing(tmp_path: Path) -> None:
    make_foreign(tmp_path, "qwen2")
    ours = Tokenizer.load(tmp_path)
    size = ours.vocab_size
    ours.widen(size + 3)
    assert ours.vocab_size == size and ours.decode([*ours.encode("len"), size + 2], keep_special=True) == "len"


def test_vocabulary_without_an_end_of_text_is_refused(tmp_path: Path) -> None:
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"tokenizer\.json: the vocabulary has no token that ends a text"):
        Tokenizer.load(tmp_path)


def test_vocabulary_of_characters_is_refused_by_one_of_its_pieces(tmp_path: Path) -> None:
    tokenizers.Tokenizer(tokenizers.models.BPE({"▁the": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        DataError, match=r"not a byte-level BPE tokenizer: '▁the' is a piece(.|\n)*hint: .*without text"
    ):
        Tokenizer.load(tmp_path)


# ------------------------------------------------------------------------------------------------------- the section


def work_at(folder: Path, documents: list[Document], lessons: list[Conversation] | None = None) -> Work:
    for split in ("train", "valid"):
        write_records(folder / "corpus" / f"documents-{split}.jsonl", documents if split == "train" else documents[:3])
        if lessons:
            write_records(folder / "lessons" / f"{split}.jsonl", lessons)
    inputs = {name: folder / name for name in ("corpus", "lessons") if (folder / name).is_dir()}
    (folder / "tokenizer").mkdir()
    return cast(Work, SimpleNamespace(folder=StageFolder(folder / "tokenizer"), inputs=inputs, seed=1, recipe=None))


def documents(part: str, count: int) -> list[Document]:
    text = "The {part} number {n} says that a value of {n} is returned, not {m}.\n"
    return [Document(text.format(part=part, n=n, m=n * n), meta={"part": part}) for n in range(count)]


def test_section_learns_from_corpus_and_lessons_and_reports(tmp_path: Path) -> None:
    lesson = Conversation((Message("user", "what is xyzzyx?"), Message("assistant", "xyzzyx is a spell")))
    work = work_at(tmp_path, documents("docs", 200) + documents("code", 400), [lesson] * 200)
    report = run(TokenizerConfig(vocab_size=330, sample_mb=0.05), work)
    tokenizer = Tokenizer.load(work.folder.path)
    assert report["vocab_size"] == tokenizer.vocab_size == 330
    assert report["fingerprint"] == tokenizer.fingerprint
    assert len(tokenizer.encode("xyzzyx")) == 1  # stands in the lessons only
    assert {"user", "assistant"} <= set(report["roles_in_one_piece"])
    assert set(report["bytes_per_token"]) == set(report["fertility"]) == {"docs", "code", "lessons"}
    assert report["round_trips"] == report["round_trips_exact"] > 0
    assert report["bytes_per_token"]["lessons"] == pytest.approx(1 / report["fertility"]["lessons"], rel=0.01)  # ASCII
    assert "330 tokens" in report["line"]


def test_parts_share_the_sample_evenly_as_far_as_they_have_text(tmp_path: Path) -> None:
    work = work_at(tmp_path, documents("docs", 20) + documents("code", 999) + documents("web", 999))
    report = run(TokenizerConfig(vocab_size=300, sample_mb=0.02), work)
    sizes = {part: sum(map(len, texts)) for part, texts in _sample(work, "train", 20_000).items()}
    assert sizes["docs"] == sum(len(document.text) for document in documents("docs", 20))  # all it has
    rest = (20_000 - sizes["docs"]) / 2
    assert sizes["code"] == pytest.approx(rest, abs=80) and sizes["web"] == pytest.approx(rest, abs=80)
    assert report["sample_mb"] == pytest.approx(0.02, abs=0.0002)


def test_empty_corpus_is_an_error_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"documents-train\.jsonl: the corpus has no text(.|\n)*hint: "):
        run(TokenizerConfig(), work_at(tmp_path, []))
