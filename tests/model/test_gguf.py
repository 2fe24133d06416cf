"""GGUF files read back: by the gguf package's reader, by transformers, and (opt-in) by llama.cpp itself.

The tests marked `llamacpp` need llama-cpp-python, in this environment or in that of the interpreter that LYCEUM_LLAMA_PYTHON
names; they print what they measured (`pytest -m llamacpp -s`).
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import torch

from lyceum.cli import main
from lyceum.corpus.records import Conversation, Message
from lyceum.errors import CheckpointError, LyceumError, ResourceError, UsageError
from lyceum.model.checkpoint import save_checkpoint
from lyceum.model.gguf import export_gguf
from lyceum.model.heads import ScoreModel
from lyceum.model.transformer import Decoder
from lyceum.tokens.chat import ChatFormat
from lyceum.tokens.tokenizer import Tokenizer

TEXTS = [
    "The quick brown fox, who'd jumped 1234 times, DIDN'T stop: it's naïve café — 我想学习很多东西 🦙🏽!",
    "def main(argv: list[str]) -> int:\n    return 0  # a comment\n\n\n\tprint('hello', \"world\")\r\n",
    "system\nuser\nassistant\ntool\n",
]
HOSTILE = [
    "", " ", "  ", "\n", "\r\n\r\n", " \n \t\n", "\t\t x", "a  b   c", "\x00", "\x00\x01a\x7f", "\ufeffbom", "x\u200d\u200by",
    "<|im_end|>", "a<|im_start|>user\n", "<|endoftext|><|pad|>", "<tool_call>{}</tool_call>", "<|fim_prefix|>x", "<|im_end",
    "we'Ll DON'T 'S it's'tt ''", "3.14159 1,000,000 ½ ² ٣٤٥ Ⅻ", "e\u0301 é ﬁ Å", "ﷺ", "中文，没有空格。日本語テキスト 한국어",
    "👩‍👩‍👧‍👦🏳️‍🌈 🇩🇪",
    "\u00a0\u2003\u3000x\u00a0", "a\u0085b\u2028c\u2029d", "नमस्ते ประเทศไทย مرحبا שלום", "\U0010ffff\ue000\ufffd",
    "==>>!!??...\n\n", "\\u0041 C:\\x",
    "x" * 300, " " * 77 + "x", "\n" * 40, "!?" * 90,
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([text for text in TEXTS for _ in range(4)], 400)


@pytest.fixture
def folder(tmp_path, tiny_spec, random_decoder, tokenizer):
    """Make a checkpoint of a random model; five rows of its embedding have no token."""

    def make(name="c", **changes):
        spec = tiny_spec(vocab_size=tokenizer.vocab_size + 5, context_length=128, **changes)
        save_checkpoint(
            tmp_path / name, random_decoder(spec), tokenizer, {"recipe": "demo", "section": "sft", "seed": 3}
        )
        return tmp_path / name

    return make


def read(path):
    """(metadata, tensors as fp32 arrays, tensors' types) of a file, by the package's reader."""
    reader = gguf.GGUFReader(path)
    values = {key: field.contents() for key, field in reader.fields.items()}
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    tensors = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    return values, tensors, types


def weights(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_computes_our_logits_from_the_file(folder, tied, qk_norm):
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    # transformers does not read the key length of qwen3 from such a file, and takes its default
    source = folder(tied=tied, qk_norm=qk_norm, head_width=128 if qk_norm else 16)
    export_gguf(source, source / "model.gguf", "f32")
    theirs = AutoModelForCausalLM.from_pretrained(source, gguf_file="model.gguf", dtype=torch.float32)
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM")
    assert theirs.config.num_key_value_heads == 2 and theirs.config.max_position_embeddings == 128
    ours = load_checkpoint_model(source)
    tokens = torch.randint(0, 400, (2, 30), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(theirs(tokens).logits, ours.logits(ours(tokens)), rtol=0, atol=1e-4)


def load_checkpoint_model(source) -> Decoder:
    from lyceum.model.checkpoint import load_checkpoint

    return load_checkpoint(source).model.requires_grad_(False)


@pytest.mark.parametrize("file_type", ["f32", "f16", "q8_0"])
def test_every_weight_comes_back_as_exactly_as_its_type_can_hold_it(folder, file_type):
    source = folder(tied=False)
    done = export_gguf(source, source / "model.gguf", file_type)
    _, found, types = read(source / "model.gguf")
    assert done.num_bytes == (source / "model.gguf").stat().st_size and done.kept_f16 == ()
    assert len(found) == len(weights(source)) == 3 + 2 * 11
    assert {types[name] for name in found if "norm" in name} == {"F32"}
    assert {types[name] for name in found if "norm" not in name} == {file_type.upper()}
    names = {"token_embd": "model.embed_tokens", "blk.1.ffn_down": "model.layers.1.mlp.down_proj", "output": "lm_head"}
    names |= {"blk.0.attn_q": "model.layers.0.self_attn.q_proj", "output_norm": "model.norm"}
    for theirs, ours in names.items():
        original, back = weights(source)[f"{ours}.weight"], found[f"{theirs}.weight"]
        if types[f"{theirs}.weight"] == "F32":
            assert np.array_equal(back, original)
        elif file_type == "f16":
            assert np.array_equal(back, original.astype(np.float16).astype(np.float32))
        else:  # half a step of the block's scale; the scale itself is rounded to 11 bits, and multiplied by up to 127
            blocks = original.reshape(-1, 32)
            step = np.abs(blocks).max(1, keepdims=True) / 127
            assert (np.abs(back.reshape(-1, 32) - blocks) <= step * (0.5 + 127 / 2**11) + 1e-9).all()
            assert (np.abs(back.reshape(-1, 32) - blocks) > step * 0.25).any()  # the control: it did round


def test_rows_of_q_and_k_stand_in_llama_cpp_s_order_without_qk_norm(folder):
    source = folder(qk_norm=False)  # heads of 16: the pairs are (0, 8), (1, 9), ...
    export_gguf(source, source / "model.gguf", "f32")
    values, found, _ = read(source / "model.gguf")
    assert values["general.architecture"] == "llama" and "blk.0.attn_q_norm.weight" not in found
    order = [row for head in range(4) for pair in range(8) for row in (16 * head + pair, 16 * head + pair + 8)]
    ours = weights(source)
    assert np.array_equal(found["blk.1.attn_q.weight"], ours["model.layers.1.self_attn.q_proj.weight"][order])
    assert np.array_equal(found["blk.1.attn_k.weight"], ours["model.layers.1.self_attn.k_proj.weight"][order[:32]])
    assert np.array_equal(found["blk.1.attn_v.weight"], ours["model.layers.1.self_attn.v_proj.weight"])


def test_rows_that_are_no_multiple_of_32_stay_f16_and_are_named(folder, capsys):
    source = folder(width=48)
    assert main.main(["export", str(source), "--to", "gguf", "--type", "q8_0", "-o", str(source / "model.gguf")]) == 0
    _, found, types = read(source / "model.gguf")
    fine = {name for name, kind in types.items() if kind == "Q8_0"}
    assert fine == {f"blk.{n}.{name}.weight" for n in (0, 1) for name in ("attn_output", "ffn_down")}
    assert types["token_embd.weight"] == types["blk.0.attn_q.weight"] == "F16"
    shown = capsys.readouterr().out
    assert "4 q8_0" in shown and "token_embd.weight, blk.0.attn_q.weight" in shown and "ffn_down" not in shown


# -- what else the file says -------------------------------------------------------------------------------------------


def test_the_file_says_the_shape_the_marked_tokens_and_where_it_came_from(folder, tokenizer):
    source = folder()
    export_gguf(source, source / "model.gguf", "q8_0")
    values, _, _ = read(source / "model.gguf")
    shape = {key.removeprefix("qwen3."): value for key, value in values.items() if key.startswith("qwen3.")}
    assert shape == {
        "vocab_size": tokenizer.vocab_size + 5,
        "block_count": 2,
        "embedding_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "rope.dimension_count": 16,
        "feed_forward_length": 128,
        "context_length": 128,
        "rope.freq_base": 5000.0,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
    }
    marked = {key: values["tokenizer.ggml.tokens"][n] for key, n in values.items() if key.endswith("_token_id")}
    assert {key.removeprefix("tokenizer.ggml.").removesuffix("_token_id"): token for key, token in marked.items()} == {
        "bos": "<|endoftext|>",
        "eos": "<|im_end|>",
        "eot": "<|im_end|>",
        "padding": "<|pad|>",
        "fim_pre": "<|fim_prefix|>",
        "fim_suf": "<|fim_suffix|>",
        "fim_mid": "<|fim_middle|>",
    }
    assert values["tokenizer.ggml.add_bos_token"] is False
    assert values["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0 and values["general.name"] == "demo sft"
    assert json.loads(values["lyceum.json"]) == {"recipe": "demo", "section": "sft", "seed": 3}
    template = json.loads((source / "tokenizer_config.json").read_text())["chat_template"]
    assert values["tokenizer.chat_template"] == template


def test_a_vocabulary_built_from_the_file_gives_our_ids(folder, tokenizer):
    source = folder()
    export_gguf(source, source / "model.gguf")
    values, _, _ = read(source / "model.gguf")
    words, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert len(words) == len(kinds) == tokenizer.vocab_size + 5 == len(set(words))
    assert {word for word, kind in zip(words, kinds, strict=True) if kind == 3} == set(Tokenizer.SPECIALS)
    assert kinds[-5:] == [5] * 5 and kinds.count(1) == tokenizer.vocab_size - len(Tokenizer.SPECIALS)
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    pattern = (  # Qwen2's, as llama.cpp's list of known ones spells it
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    assert values["tokenizer.ggml.pre"] == "qwen2" and values["tokenizer.ggml.model"] == "gpt2"
    rebuilt = tokenizers.Tokenizer(tokenizers.models.BPE({word: n for n, word in enumerate(words)}, merges))
    rebuilt.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    for text in TEXTS + HOSTILE:
        assert rebuilt.encode(text).ids == tokenizer.encode(text), text
    assert any(len(tokenizer.encode(text)) < len(text.encode()) / 2 for text in TEXTS)  # merges were at work


def test_the_file_is_named_after_the_model_and_the_type_where_no_name_is_given(folder, monkeypatch, tmp_path, capsys):
    source = folder()
    monkeypatch.chdir(tmp_path)
    assert main.main(["export", str(source)]) == 0
    assert capsys.readouterr().out.startswith("demo-sft-f16.gguf: ")
    assert read(tmp_path / "demo-sft-f16.gguf")[0]["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16


# -- what cannot be exported -------------------------------------------------------------------------------------------


def test_a_reward_model_is_refused(tmp_path, tiny_spec, random_decoder, tokenizer):
    model = ScoreModel(random_decoder(tiny_spec(vocab_size=tokenizer.vocab_size)))
    save_checkpoint(tmp_path / "c", model, tokenizer)
    with pytest.raises(CheckpointError, match="holds a reward model") as caught:
        export_gguf(tmp_path / "c", tmp_path / "model.gguf")
    assert "pretrain, sft or ppo" in caught.value.hint


def test_a_model_without_a_vocabulary_is_refused(tmp_path, tiny_spec, random_decoder):
    save_checkpoint(tmp_path / "c", random_decoder(tiny_spec()))
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        export_gguf(tmp_path / "c", tmp_path / "model.gguf")


def edit_tokenizer(source, change):
    table = json.loads((source / "tokenizer.json").read_text())
    change(table)
    (source / "tokenizer.json").write_text(json.dumps(table))


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\S+|\s+"),
        lambda table: table["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        lambda table: table.update(normalizer={"type": "NFC"}),
        lambda table: table["model"].update(ignore_merges=True),
        lambda table: table["model"].update(merges=[]),
    ],
    ids=["pattern", "prefix space", "normaliser", "merges ignored", "no merges"],
)
def test_a_vocabulary_that_llama_cpp_would_apply_otherwise_is_refused(folder, change):
    source = folder()
    edit_tokenizer(source, change)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cuts text up in another way"):
        export_gguf(source, source / "model.gguf")
    assert not (source / "model.gguf").exists()


def test_a_variant_that_the_file_cannot_say_is_refused(tmp_path, tiny_spec, random_decoder, tokenizer):
    spec = tiny_spec(vocab_size=tokenizer.vocab_size, qk_norm=False, biases=("q_proj", "k_proj", "v_proj"))
    save_checkpoint(tmp_path / "c", random_decoder(spec), tokenizer)
    with pytest.raises(CheckpointError, match=r"has biases = .*q_proj.*, which cannot be written as GGUF"):
        export_gguf(tmp_path / "c", tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(("number", "file_type"), [(7e4, "f16"), (-7e4, "q8_0"), (float("nan"), "f32")])
def test_numbers_that_a_type_cannot_hold_are_an_error_and_leave_no_file(
    tmp_path, tiny_spec, random_decoder, tokenizer, number, file_type
):
    decoder = random_decoder(tiny_spec(vocab_size=tokenizer.vocab_size))
    with torch.no_grad():
        decoder.model.layers[1].mlp.up_proj.weight[3, 4] = number
    save_checkpoint(tmp_path / "c", decoder, tokenizer)
    (tmp_path / "model.gguf").write_text("an older file")
    with pytest.raises(CheckpointError, match=rf"layers\.1\.mlp\.up_proj\.weight is .*, too large for {file_type}"):
        export_gguf(tmp_path / "c", tmp_path / "model.gguf", file_type)
    assert (tmp_path / "model.gguf").read_text() == "an older file"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "model.gguf"]


def test_a_full_disk_is_told_and_leaves_the_older_file(folder, monkeypatch):
    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    source = folder()
    (source / "model.gguf").write_text("an older file")
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(ResourceError, match=r"the disk is full: could not write .*model\.gguf\n"):
        export_gguf(source, source / "model.gguf")
    assert (source / "model.gguf").read_text() == "an older file"
    assert [path.name for path in source.glob("model.gguf*")] == ["model.gguf"]


def test_a_missing_package_an_unknown_type_and_a_folder_as_file_are_told(folder, monkeypatch):
    source = folder()
    with pytest.raises(UsageError, match="no type 'q8' of GGUF") as caught:
        export_gguf(source, source / "model.gguf", "q8")
    assert "q8_0" in caught.value.hint
    with pytest.raises(UsageError, match="is a folder, expected the name of a file"):
        export_gguf(source, source)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(LyceumError, match="needs the package gguf") as missing:
        export_gguf(source, source / "model.gguf")
    assert missing.value.hint == "pip install gguf"


# -- llama.cpp itself --------------------------------------------------------------------------------------------------

LLAMA_PYTHON = os.environ.get("LYCEUM_LLAMA_PYTHON", "")
needs_llama_cpp = pytest.mark.skipif(
    not LLAMA_PYTHON and importlib.util.find_spec("llama_cpp") is None,
    reason="no llama-cpp-python here (install it, or name an interpreter that has it in LYCEUM_LLAMA_PYTHON)",
)
NUM_NEW = 24
CHATS = [
    [Message("user", "What does café mean?"), Message("assistant", "It is a place — naïve & nice ☕.")],
    [Message("system", "Be brief."), Message("user", "print('hello')"), Message("assistant", "It prints hello.")],
    [Message("user", "我想学习"), Message("assistant", "很好! Let's begin.")],
    [Message("user", "\n\n  two lines\n"), Message("assistant", "Yes, two."), Message("user", "Sure? 🦙")],
]


def prompt_of(chat: list[Message]) -> Conversation:
    """The conversation up to its last user's message."""
    last = max(n for n, message in enumerate(chat) if message.role == "user")
    return Conversation(tuple(chat[: last + 1]))


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def schooled(request, tmp_path_factory, tokenizer):
    """A model that has read the texts and conversations above for 150 steps: its checkpoint's folder, and itself."""
    from lyceum.model.spec import ModelSpec

    qk_norm = request.param == "qwen3"
    spec = ModelSpec(tokenizer.vocab_size + 5, 2, 64, 4, 2, 16, 128, 128, tied=qk_norm, qk_norm=qk_norm)
    decoder = Decoder(spec, torch.Generator().manual_seed(1))
    format = ChatFormat(tokenizer)
    documents = [format.render(Conversation(tuple(chat))).ids for chat in CHATS]
    documents += [[*tokenizer.encode(text), tokenizer.end_id] for text in TEXTS]
    rows = torch.full((len(documents), 128), tokenizer.pad_id)
    for row, ids in zip(rows, documents, strict=True):
        row[: len(ids)] = torch.tensor(ids[:128])
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    for _ in range(150):
        logits = decoder.logits(decoder(rows[:, :-1]))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp(request.param)
    save_checkpoint(folder / "c", decoder, tokenizer, {})
    return folder / "c", decoder.requires_grad_(False)


def ask_llama_cpp(source, file_type="f32", **request):
    """What llama.cpp says of a checkpoint's file; `request` as `llamacpp_peer.py` reads it."""
    export_gguf(source, source / "model.gguf", file_type)
    request |= {"model": str(source / "model.gguf"), "num_new": NUM_NEW}
    (source / "request.json").write_text(json.dumps(request))
    peer = Path(__file__).with_name("llamacpp_peer.py")
    command = [LLAMA_PYTHON or sys.executable, str(peer), str(source / "request.json"), str(source / "answer.npz")]
    subprocess.run(command, check=True, timeout=100)
    answer = np.load(source / "answer.npz")
    return json.loads(str(answer["said"])), answer["logits"]


def greedy(decoder, ids, stop_ids):
    ids = list(ids)
    start = len(ids)
    while len(ids) - start < NUM_NEW:
        ids.append(int(decoder.logits(decoder(torch.tensor([ids]))[0, -1]).argmax()))
        if ids[-1] in stop_ids:
            break
    return ids[start:]


@pytest.mark.llamacpp
@needs_llama_cpp
def test_llama_cpp_continues_twenty_prompts_as_we_do(schooled, tokenizer):
    source, decoder = schooled
    format = ChatFormat(tokenizer)
    prompts = [format.prompt(prompt_of(chat)) for chat in CHATS]
    texts = [
        "The",
        "def main(",
        "system\n",
        "我想",
        "naïve café",
        "print('",
        "0 1 2",
        "🦙",
        " ",
        "\n\n",
        "x = [",
        "who'd",
        "'\n",
        "ﬁ é",
    ]
    prompts += [tokenizer.encode(text) for text in texts] + [[tokenizer.end_id], [tokenizer.fim_prefix_id, 40, 41]]
    assert len(prompts) == 20
    ours = [greedy(decoder, prompt, format.stop_ids) for prompt in prompts]
    said, _ = ask_llama_cpp(source, prompts=prompts)
    assert said["greedy"] == ours
    assert len({tuple(new) for new in ours}) > 10 and any(new[-1] in format.stop_ids for new in ours)
    assert set(said["ends"]) == set(format.stop_ids)


@pytest.mark.llamacpp
@needs_llama_cpp
def test_llama_cpp_chats_with_the_template_of_the_file(schooled, tokenizer):
    source, decoder = schooled
    format = ChatFormat(tokenizer)
    conversations = [prompt_of(chat) for chat in CHATS]
    asked = [[{"role": m.role, "content": m.content} for m in c.messages] for c in conversations]
    said, _ = ask_llama_cpp(source, conversations=asked)
    for conversation, reply in zip(conversations, said["replies"], strict=True):
        new = greedy(decoder, format.prompt(conversation), format.stop_ids)
        assert reply["message"]["content"].strip() == tokenizer.decode(new).strip()
        assert reply["finish_reason"] == ("stop" if new[-1] in format.stop_ids else "length")
    assert any(reply["finish_reason"] == "stop" for reply in said["replies"])


@pytest.mark.llamacpp
@needs_llama_cpp
def test_llama_cpp_cuts_hostile_text_into_our_ids(schooled, tokenizer):
    source, _ = schooled
    texts = TEXTS + HOSTILE
    folder = Path(os.environ.get("LYCEUM_DATA", Path(__file__).parents[2] / ".." / "shared" / "data")) / "tok-vectors"
    if not folder.is_dir():
        pytest.skip("no shared data sets here (set LYCEUM_DATA to their folder)")
    for file in sorted(folder.glob("*.inp")):
        texts += file.read_bytes().decode().split("\n__ggml_vocab_test__\n")
    assert len(texts) > 100
    format = ChatFormat(tokenizer)
    rendered = [text for text in HOSTILE if "<" not in text]
    chats = [Conversation((Message("user", text),)) for text in rendered]
    turns = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in rendered]
    said, _ = ask_llama_cpp(source, texts=texts, rendered=turns)
    assert said["text_ids"] == [tokenizer.encode(text) for text in texts]
    assert said["rendered_ids"] == [format.prompt(chat) for chat in chats]


@pytest.mark.llamacpp
@needs_llama_cpp
@pytest.mark.parametrize(
    ("file_type", "max_kl", "min_equal"), [("f32", 1e-6, 1.0), ("f16", 1e-4, 0.98), ("q8_0", 1e-2, 0.95)]
)
def test_llama_cpp_s_distributions_are_ours_to_the_type_s_precision(schooled, tokenizer, file_type, max_kl, min_equal):
    source, decoder = schooled
    rows = [tokenizer.encode(text)[:120] for text in (*TEXTS, *HOSTILE) if text]
    _, theirs = ask_llama_cpp(source, file_type, rows=rows)
    ours = torch.cat([decoder.logits(decoder(torch.tensor([row]))[0]) for row in rows]).double().log_softmax(-1)
    other = torch.from_numpy(theirs).double().log_softmax(-1)
    assert ours.shape == other.shape and len(ours) > 500
    kl = float((ours.exp() * (ours - other)).sum(-1).mean())
    equal = float((ours.argmax(-1) == other.argmax(-1)).double().mean())
    print(f"\n{source.parent.name} {file_type}: KL {kl:.2e} nats a token, equal top tokens {equal:.4f} of {len(ours)}")
    assert kl < max_kl and equal >= min_equal
