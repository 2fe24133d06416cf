"""Text to ids and back: byte-level BPE with special tokens that text can never become.

The merges are learned and applied by the `tokenizers` library; the file is its ``tokenizer.json``, which `transformers`
opens as it is. Five choices, each with its reason:

- **Pre-tokenisation is Qwen2's pattern**, word for word: llama.cpp knows it by the name ``qwen2``.
- **No normaliser.** Qwen2's own file has NFC, llama.cpp applies none; without it decoding gives back exactly what was
  encoded, and both programs agree. A corpus that wants NFC is normalised when it is made.
- **All 256 bytes are pieces**, so there is no unknown token. (Half a surrogate pair is not text: it becomes U+FFFD.)
- **Han runs are bounded, while merges are counted**: Chinese has no spaces, a pre-token is a whole clause, and the
  vocabulary would fill with long phrases. Encoding knows no bound: its pattern stays Qwen2's.
- **Text never becomes a special token.** `encode` spells out ``<|im_end|>`` in ordinary pieces, whoever wrote it;
  special tokens are put between texts as ids, in `lyceum.tokens.chat`. A vocabulary that cannot do this is refused.
  Other programs that open the same file do find special tokens in text, unless told ``split_special_tokens=True``.

ASCII text takes a shorter way to the same ids, about seven times faster: Python's `re` finds the pre-tokens and the ids
of each are looked up. A test compares the two ways. A long text is encoded in pieces, with the same ids
(`lyceum.corpus.cut`): a gigabyte in one line takes the memory of its ids, not of the library's tables.

    lyceum tokenizer recipes/demo.toml

**A vocabulary made elsewhere** (GPT-2's, Llama 3's, Qwen's) is used as it is: nothing is added. Its own tokens play the
roles it has them for; a role that it has no token for has the id `ABSENT`, and what needs that role says so: without turn
marks there is no chat, without tool marks no tool. Saved, it is the file it came from; where it can chat, the template
beside it is ours, because that is the format we speak.

Not here: the chat format (`lyceum.tokens.chat`), and tokenizers that are not byte-level BPE (Llama 2's).
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from lyceum.config import setting
from lyceum.corpus.cut import ENCODED, cut
from lyceum.corpus.records import ROLES, content_id, read_conversations, read_documents
from lyceum.errors import ConfigError, DataError
from lyceum.log import log, progress
from lyceum.run import Work, write_json, write_text
from lyceum.tokens.chat import CHAT_TEMPLATE, pieces

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ABSENT = -1  # the id of a special token that the vocabulary does not have: no id of a text is equal to it
ENDS = ("<|endoftext|>", "<|end_of_text|>")  # what vocabularies made elsewhere call the end of a text,
PADS = ("<|pad|>", "<|fim_pad|>", "<|finetune_right_pad_id|>", "<|im_start|>")  # and what may pad, as it ends nothing
HAN_RUN = 8  # characters; the longest Chinese piece that can be learned
_LETTERS = rf"(?:\p{{Han}}{{1,{HAN_RUN}}}|[\p{{L}}&&[^\p{{Han}}]]+)"
_TRAINING_PATTERN = PATTERN.replace(r"\p{L}+", _LETTERS)
# PATTERN for text that is all ASCII, in the words of Python's re: there \p{L} is A-Z and a-z, \p{N} is 0-9.
_ASCII_WORDS = re.compile(
    r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    re.ASCII,
)


def _pre_tokenizer(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _byte_of_letter() -> dict[str, int]:
    """GPT-2's spelling of bytes as letters, reversed: a byte that prints is itself, the others count up from 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(rest)}


def _whole_characters(text: str) -> str:
    """`text` without halves of surrogate pairs, which have no UTF-8: pairs are joined, halves become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class _Words(dict[str, list[int]]):
    """The ids of pre-tokens seen so far; a new one is encoded when asked for, and kept while there is room."""

    ROOM, LONGEST = 200_000, 64

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        super().__init__()
        self._inner = inner

    def __missing__(self, word: str) -> list[int]:
        ids = self._inner.encode(word, add_special_tokens=False).ids
        self._keep(word, ids)
        return ids

    def learn(self, words: Iterable[str]) -> None:
        """Encode the new ones of many words together, which is faster than one by one."""
        new = [word for word in set(words) if word not in self]
        for word, found in zip(new, self._inner.encode_batch_fast(new, add_special_tokens=False), strict=True):
            self._keep(word, found.ids)

    def _keep(self, word: str, ids: list[int]) -> None:
        if len(self) < self.ROOM and len(word) <= self.LONGEST:
            self[word] = ids


class Tokenizer:
    """A vocabulary: text to ids and back. It never changes after it is made.

    Args:
        inner: the library's tokenizer; `train` and `load` make it.
        origin: of a vocabulary made elsewhere, its tokenizer.json and its settings.

    Raises:
        DataError: a special token is missing from it, or text can spell one; it is not byte-level.
    """

    SPECIALS = (
        "<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
        "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    )  # fmt: skip

    def __init__(self, inner: tokenizers.Tokenizer, origin: tuple[str, dict[str, Any]] | None = None) -> None:
        inner.encode_special_tokens = True  # text that spells a special token is encoded like any other text
        self._inner = inner
        table = json.loads(inner.to_str())
        added = {token["id"]: token["content"] for token in table["added_tokens"]}
        texts = {token["id"] for token in table["added_tokens"] if origin and not token["special"]}
        self.special_ids: dict[str, int] = {name: number for number, name in added.items() if number not in texts}
        missing = [name for name in self.SPECIALS if name not in self.special_ids]
        if missing and origin is None:
            raise DataError(
                f"the vocabulary has no special token {missing[0]}", hint="train one: lyceum tokenizer RECIPE"
            )
        vocabulary: dict[str, int] = table["model"]["vocab"]
        self.vocab_size = max(chain(vocabulary.values(), added)) + 1
        self.token_bytes: list[bytes] = [b""] * self.vocab_size
        byte_of = _byte_of_letter()
        for word, number in vocabulary.items():
            if number not in added:
                if strange := set(word) - byte_of.keys():
                    raise DataError(
                        f"not a byte-level BPE tokenizer: {word!r} is a piece, and {min(strange)!r} spells no byte",
                        hint="GPT-2's, Llama 3's and Qwen's are; without tokenizer.json the model loads without text",
                    )
                self.token_bytes[number] = bytes(byte_of[letter] for letter in word)
        for number in texts:
            self.token_bytes[number] = added[number].encode()
        self._spelled = [added.get(number, "").encode() or text for number, text in enumerate(self.token_bytes)]
        self.fingerprint = _fingerprint(vocabulary, table["model"]["merges"], added)
        ours = json.loads(_pre_tokenizer(PATTERN).__getstate__())
        is_ours = table["pre_tokenizer"] == ours and table["normalizer"] is None and not texts
        self._words = _Words(inner) if is_ours else None
        spelled = inner.encode(" ".join(self.special_ids), add_special_tokens=False).ids
        if set(spelled) & set(self.special_ids.values()):
            raise DataError("text can spell special tokens of this vocabulary", hint="mark them as special in the file")
        self.pad_id, self.end_id, self.turn_start_id, self.turn_end_id = self._ids(0, 4)
        self.fim_prefix_id, self.fim_middle_id, self.fim_suffix_id = self._ids(4, 7)
        self.tool_call_start_id, self.tool_call_end_id = self._ids(7, 9)
        self.tool_response_start_id, self.tool_response_end_id = self._ids(9, 11)
        self.stop_ids: tuple[int, ...] = (self.turn_end_id, self.end_id)  # of these one ends what is generated
        self._origin = origin
        if origin is not None:
            self._take_roles(origin[1])

    def _ids(self, start: int, stop: int) -> list[int]:
        return [self.special_ids.get(name, ABSENT) for name in self.SPECIALS[start:stop]]

    def _take_roles(self, config: dict[str, Any]) -> None:
        """Find who ends a text and who pads in a vocabulary made elsewhere."""
        ends = [self.special_ids[name] for name in (*ENDS, config.get("eos_token")) if name in self.special_ids]
        if not ends:
            raise DataError(
                "the vocabulary has no token that ends a text",
                hint="tokenizer_config.json beside it should name its eos_token; or train one: lyceum tokenizer RECIPE",
            )
        self.end_id = ends[0]
        self.stop_ids = tuple(number for number in dict.fromkeys((self.turn_end_id, *ends)) if number != ABSENT)
        pads = [self.special_ids[name] for name in (config.get("pad_token"), *PADS) if name in self.special_ids]
        self.pad_id = next((number for number in pads if number not in self.stop_ids), self.end_id)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges from texts until there are `vocab_size` tokens, or no pair that occurs twice is left.

        Raises:
            ConfigError: `vocab_size` has no room for the special tokens and the 256 bytes.
        """
        least = len(cls.SPECIALS) + 256
        if vocab_size < least:
            raise ConfigError(
                f"vocab_size is {vocab_size}, expected {least} or more", hint="2048 is a small vocabulary"
            )
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = _pre_tokenizer(_TRAINING_PATTERN)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            special_tokens=[AddedToken(name, special=True, normalized=False) for name in cls.SPECIALS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        inner.train_from_iterator(map(_whole_characters, texts), trainer)
        inner.pre_tokenizer = _pre_tokenizer(PATTERN)
        inner.decoder = decoders.ByteLevel()
        return cls(inner)

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Read the tokenizer of a folder: a section's, or any checkpoint's, also one made elsewhere.

        Raises:
            DataError: there is no ``tokenizer.json``, it cannot be read, or it is not such a vocabulary.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise DataError("there is no such file", file=path, hint="make it with: lyceum tokenizer RECIPE")
        try:
            text = path.read_text(encoding="utf-8")
            table = json.loads(text)
            if set(cls.SPECIALS) <= {token["content"] for token in table["added_tokens"]}:
                return cls(tokenizers.Tokenizer.from_str(text))
            for token in table["added_tokens"]:  # so that text cannot become a mark: Qwen's <tool_call> is not special
                token["special"] |= token["content"].startswith("<") and token["content"].endswith(">")
            table |= {"truncation": None, "padding": None}
            return cls(tokenizers.Tokenizer.from_str(json.dumps(table)), (text, _foreign_config(path.parent)))
        except DataError as error:
            raise DataError(error.message, file=path, hint=error.hint) from None
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(
                f"not a byte-level BPE tokenizer: {error}", file=path, hint="make or copy it again"
            ) from error

    def save(self, folder: Path | str) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` (with the chat template) into `folder`."""
        folder = Path(folder)
        if self._origin is not None:
            text, config = self._origin
            names = {number: name for name, number in self.special_ids.items()}
            config = {
                **config,
                "eos_token": config.get("eos_token") or names[self.end_id],
                "pad_token": names[self.pad_id],
            }
            if ABSENT not in (self.turn_start_id, self.turn_end_id):
                config["chat_template"] = CHAT_TEMPLATE
            write_text(folder / "tokenizer.json", text)
            write_json(folder / "tokenizer_config.json", config)
            return
        write_text(folder / "tokenizer.json", self._inner.to_str(pretty=True))
        write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "pad_token": self.SPECIALS[0],
                "eos_token": self.SPECIALS[3],  # the end of a turn: where generation should stop
                "additional_special_tokens": [*self.SPECIALS[1:3], *self.SPECIALS[4:]],
                "clean_up_tokenization_spaces": False,
                "chat_template": CHAT_TEMPLATE,
            },
        )

    def encode(self, text: str) -> list[int]:
        """The ids of a text; never a special one, whatever it spells."""
        if self._is_long(text):
            pieces = cut(text, ENCODED)
            groups = iter(lambda: list(islice(pieces, 16)), [])
            return [number for group in groups for ids in self.encode_batch(group) for number in ids]
        if self._words is not None and text.isascii():
            return self._look_up(_ASCII_WORDS.findall(text))
        return self._inner.encode(_whole_characters(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text; the faster way for many."""
        found = {n: self.encode(text) for n, text in enumerate(texts) if self._is_long(text)}
        if self._words is not None:
            ascii_texts = {n: text for n, text in enumerate(texts) if n not in found and text.isascii()}
            words = {n: _ASCII_WORDS.findall(text) for n, text in ascii_texts.items()}
            self._words.learn(chain.from_iterable(words.values()))
            found |= {n: self._look_up(words[n]) for n in words}
        rest = [n for n in range(len(texts)) if n not in found]
        others = self._inner.encode_batch_fast([_whole_characters(texts[n]) for n in rest], add_special_tokens=False)
        found |= {n: other.ids for n, other in zip(rest, others, strict=True)}
        return [found[n] for n in range(len(texts))]

    def _is_long(self, text: str) -> bool:
        """Whether a text is encoded in pieces: only where the pattern is ours, which ends a token at every cut."""
        return self._words is not None and len(text) > ENCODED

    def _look_up(self, words: list[str]) -> list[int]:
        assert self._words is not None
        return list(chain.from_iterable(map(self._words.__getitem__, words)))

    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD. Special tokens are left out unless kept by name."""
        table = self._spelled if keep_special else self.token_bytes
        return b"".join([table[number] for number in ids]).decode("utf-8", "replace")

    def widen(self, num_ids: int) -> None:
        """Let ids up to `num_ids` be decoded, as nothing: the rows of a model's embedding that no token has."""
        for table in (self.token_bytes, self._spelled):
            table += [b""] * (num_ids - len(table))


def _foreign_config(folder: Path) -> dict[str, Any]:
    """What the files beside a tokenizer.json say of it; older ones keep the special tokens and the template apart."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config |= json.loads((folder / name).read_text(encoding="utf-8"))
    if (folder / "chat_template.jinja").is_file():
        config["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    is_token = {key for key, value in config.items() if isinstance(value, dict) and "content" in value}
    return {key: value["content"] if key in is_token else value for key, value in config.items()}


def _fingerprint(vocabulary: dict[str, int], merges: Sequence[Any], added: dict[int, str]) -> str:
    pairs = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in merges]
    parts = [sorted(vocabulary.items(), key=lambda item: item[1]), pairs, sorted(added.items())]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


# ------------------------------------------------------------------------------------------- the section of a recipe


@dataclass(frozen=True)
class TokenizerConfig:
    """Settings of a recipe's ``[tokenizer]``."""

    vocab_size: int = setting(
        2048, "how many tokens, the special ones and the 256 bytes included", low=len(Tokenizer.SPECIALS) + 256
    )
    sample_mb: float = setting(4.0, "megabytes of text to learn from, shared evenly between the parts", low=0.001)


def run(config: TokenizerConfig, work: Work) -> dict[str, Any]:
    """Learn the vocabulary of a recipe from its corpus, and from its lessons where it has any.

    Args:
        work: its inputs are ``corpus`` and, if there, ``lessons``: their training texts are learned from, their
            validation texts measured.

    Returns:
        The report: vocabulary, bytes per token and fertility (tokens per character) by part, round trips, seconds.

    Raises:
        DataError: the corpus is empty.
    """
    start = time.monotonic()
    with progress(3, "tokenizer", unit="step") as bar:
        sample = _sample(work, "train", config.sample_mb * 1e6)
        sample_bytes = sum(_num_bytes(text) for texts in sample.values() for text in texts)
        if not sample_bytes:
            raise DataError(
                "the corpus has no text to learn a vocabulary from",
                file=work.inputs["corpus"] / "documents-train.jsonl",
                hint="see the corpus section's report for what was dropped, and why",
            )
        bar.update(1, MB=sample_bytes / 1e6)
        # every turn has a role's name: it shall be one piece, also a role that is rare in the lessons, or has none yet
        roles = [f"{role}\n" for role in ROLES] * (sample_bytes // 4000)
        tokenizer = Tokenizer.train(chain(*sample.values(), roles), config.vocab_size)
        tokenizer.save(work.folder.path)
        bar.update(1, tokens=tokenizer.vocab_size)
        measured = {part: _measure(tokenizer, texts) for part, texts in (sample | _sample(work, "valid", 1e6)).items()}
        bar.update(1)
    if tokenizer.vocab_size < config.vocab_size:
        log.warning(f"the text has only {tokenizer.vocab_size} tokens in it, vocab_size asks for {config.vocab_size}")
    bytes_per_token = {part: figures.pop("bytes_per_token") for part, figures in measured.items()}
    shown = ", ".join(f"{value:.2f} in {part}" for part, value in bytes_per_token.items())
    return {
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "sample_mb": round(sample_bytes / 1e6, 3),
        "bytes_per_token": bytes_per_token,
        "fertility": {part: figures["fertility"] for part, figures in measured.items()},
        "round_trips": sum(figures["round_trips"] for figures in measured.values()),
        "round_trips_exact": sum(figures["round_trips_exact"] for figures in measured.values()),
        "roles_in_one_piece": [role for role in ROLES if len(tokenizer.encode(role)) == 1],
        "seconds": round(time.monotonic() - start, 2),
        "line": f"{tokenizer.vocab_size} tokens; bytes per token: {shown}",
    }


def _texts(work: Work, split: str) -> Iterator[tuple[str, str]]:
    """(part, text) of the corpus and the lessons; a conversation's text is what stands between its special tokens."""
    for document in read_documents(work.inputs["corpus"] / f"documents-{split}.jsonl"):
        for text in cut(document.text):  # so that one long document is not the whole sample
            yield str(document.meta.get("part", "text")), text
    if "lessons" in work.inputs:
        for conversation in read_conversations(work.inputs["lessons"] / f"{split}.jsonl"):
            runs = (piece.header + piece.text for piece in pieces(conversation.messages, conversation.tools))
            yield "lessons", "".join(runs)


def _sample(work: Work, split: str, budget: float) -> dict[str, list[str]]:
    """Texts by part, about `budget` bytes of them, the same for each part as far as it has them.

    The texts with the lowest hashes are taken: always the same ones, from everywhere in the files, in one pass that
    never holds more than `budget` bytes of a part, so that a corpus may be larger than the memory.
    """
    heaps: dict[str, list[tuple[int, int, str]]] = {}  # (minus the hash, bytes, text): the highest hash comes out first
    sizes: dict[str, int] = {}
    for part, text in _texts(work, split):
        num_bytes = _num_bytes(text)
        heapq.heappush(heaps.setdefault(part, []), (-int(content_id(text), 16), num_bytes, text))
        sizes[part] = _trim(heaps[part], sizes.get(part, 0) + num_bytes, budget)
    for done, part in enumerate(sorted(sizes, key=sizes.__getitem__)):  # what a small part leaves, the others get
        sizes[part] = _trim(heaps[part], sizes[part], budget / (len(sizes) - done))
        budget -= sizes[part]
    return {part: [text for _, _, text in sorted(heap)] for part, heap in heaps.items()}


def _trim(heap: list[tuple[int, int, str]], size: int, budget: float) -> int:
    """Take out texts while `budget` bytes remain without them; returns the bytes that are left."""
    while size - heap[0][1] >= max(budget, 1):
        size -= heapq.heappop(heap)[1]
    return size


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _measure(tokenizer: Tokenizer, texts: list[str]) -> dict[str, float]:
    rows = tokenizer.encode_batch(texts)
    num_tokens = max(sum(map(len, rows)), 1)
    return {
        "bytes_per_token": round(sum(_num_bytes(text) for text in texts) / num_tokens, 3),
        "fertility": round(num_tokens / max(sum(map(len, texts)), 1), 4),
        "round_trips": len(texts),
        "round_trips_exact": sum(tokenizer.decode(ids) == text for ids, text in zip(rows, texts, strict=True)),
    }
