"""llama.cpp at work on a GGUF file, in a process of its own: `python llamacpp_peer.py REQUEST.json ANSWER.npz`.

It imports nothing of ours, so that the interpreter may be one that has only llama-cpp-python. `test_gguf.py` runs it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np

request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
model = llama_cpp.Llama(request["model"], n_ctx=128, n_threads=1, logits_all=True, type_k=0, type_v=0, verbose=False)


def logits(ids):
    model.reset()
    model.eval(ids)
    return model.scores[: len(ids)].copy()


def greedy(ids, num_new):
    model.reset()
    model.eval(ids)
    new = []
    while len(new) < num_new:
        new.append(int(model.scores[model.n_tokens - 1].argmax()))
        if llama_cpp.llama_vocab_is_eog(model._model.vocab, new[-1]):
            break
        model.eval(new[-1:])
    return new


said = {
    "text_ids": [model.tokenize(text.encode(), add_bos=True) for text in request.get("texts", [])],
    "rendered_ids": [model.tokenize(text.encode(), special=True) for text in request.get("rendered", [])],
    "greedy": [greedy(ids, request["num_new"]) for ids in request.get("prompts", [])],
    "replies": [
        model.create_chat_completion(messages, temperature=0.0, max_tokens=request["num_new"])["choices"][0]
        for messages in request.get("conversations", [])
    ],
    "ends": [n for n in range(model.n_vocab()) if llama_cpp.llama_vocab_is_eog(model._model.vocab, n)],
}
rows = [logits(ids) for ids in request.get("rows", [])]
np.savez(sys.argv[2], said=json.dumps(said), logits=np.concatenate(rows) if rows else np.zeros(0))
