"""Which tokens may come next in a reply that must have a form: a grammar of bytes, walked over a vocabulary.

A vocabulary is a trie: tokens that begin alike share the way. From the grammar's state, the trie is walked level by
level, all living nodes at once, each step one look-up in the grammar's table. Tokens may hold half a character, or the
end of one value and the beginning of the next: bytes are all that is looked at. What is found is kept for the next time
the same state is met; inside a plain string that is nearly always.

    forms = Forms(token_bytes)  # one for a vocabulary
    constraint = forms.constraint(schema, stop_ids)  # one for a request
    logits_V.masked_fill_(constraint.forbidden(), float("-inf")); ...; constraint.feed(token)

A stop token is allowed when the form is complete, and only then, whatever bytes it stands for.

Shapes: V vocabulary, N nodes of the trie.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lyceum.engine.grammar import Grammar
from lyceum.engine.schema import grammar_of
from lyceum.errors import UsageError

MAX_FORMS = 16  # schemas that are kept at hand for one vocabulary
MAX_MASKS = 32  # of one schema; each takes a byte a token
MAX_STATES = 5000  # of one schema, a kilobyte each; beyond, the next request begins with an empty table


class Trie:
    """The beginnings of all tokens. Node 0 is the empty one; nodes are numbered level by level, children side by side.

    token_bytes: bytes of every token; those without bytes (special tokens) are at no node.
    """

    def __init__(self, token_bytes: Sequence[bytes]):
        order = sorted((token for token, text in enumerate(token_bytes) if text), key=token_bytes.__getitem__)
        letters = np.frombuffer(b"".join(token_bytes[token] for token in order), dtype=np.uint8)
        lengths = np.array([len(token_bytes[token]) for token in order], dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        self.node_of_token = np.zeros(len(token_bytes), dtype=np.int64)
        tokens, parents = np.array(order, dtype=np.int64), np.zeros(len(order), dtype=np.int64)
        bytes_of, parents_of, num_nodes, depth = [np.zeros(1, np.uint8)], [np.full(1, -1)], 1, 0
        while len(tokens):
            here = letters[starts + depth]  # in order, so that tokens with one beginning stand together
            is_new = np.ones(len(tokens), dtype=bool)
            is_new[1:] = (parents[1:] != parents[:-1]) | (here[1:] != here[:-1])
            nodes = num_nodes - 1 + np.cumsum(is_new)
            bytes_of.append(here[is_new])
            parents_of.append(parents[is_new])
            num_nodes += int(is_new.sum())
            depth += 1
            is_longer = lengths > depth
            self.node_of_token[tokens[~is_longer]] = nodes[~is_longer]
            tokens, parents = tokens[is_longer], nodes[is_longer]
            starts, lengths = starts[is_longer], lengths[is_longer]
        self.byte = np.concatenate(bytes_of)
        parent = np.concatenate(parents_of)
        nodes = np.arange(num_nodes)
        self.first_child = np.searchsorted(parent, nodes).astype(np.int32)
        self.num_children = np.searchsorted(parent, nodes, side="right").astype(np.int32) - self.first_child

    def allowed(self, grammar: Grammar, state: int) -> np.ndarray:
        """Which tokens (V,) can be read from a state of the grammar without it dying."""
        is_alive = np.zeros(len(self.byte), dtype=bool)
        nodes, states = np.zeros(1, dtype=np.int32), np.full(1, state, dtype=np.int32)
        while len(nodes):
            unknown = states[~grammar.is_known.take(states)]
            for one in np.unique(unknown).tolist() if len(unknown) else ():
                grammar.know(one)
            counts = self.num_children.take(nodes)
            ends = counts.cumsum(dtype=np.int32)
            # a node's children have its first child's number and those that follow
            children = np.arange(ends[-1], dtype=np.int32) + (self.first_child.take(nodes) - ends + counts).repeat(
                counts
            )
            rows = (states << 8).repeat(counts)
            states = grammar.next.reshape(-1).take(rows + self.byte.take(children))
            is_live = states > 0
            nodes, states = children[is_live], states[is_live]
            is_alive[nodes] = True
        return is_alive[self.node_of_token]


class Form:
    """One grammar over one vocabulary: the masks of the states met so far."""

    def __init__(self, grammar: Grammar, trie: Trie, token_bytes: Sequence[bytes]):
        self.grammar = grammar
        self.token_bytes = token_bytes
        self._trie = trie
        self._masks: OrderedDict[tuple[int, tuple[int, ...]], Tensor] = OrderedDict()

    def forbidden(self, state: int, stop_ids: tuple[int, ...]) -> Tensor:
        """Tokens (V,), bool, that must not come in this state. Not to be written to."""
        key = (state, stop_ids)
        if key in self._masks:
            self._masks.move_to_end(key)
            return self._masks[key]
        allowed = self._trie.allowed(self.grammar, state)
        allowed[list(stop_ids)] = self.grammar.is_complete(state)
        mask = self._masks[key] = torch.from_numpy(~allowed)
        if len(self._masks) > MAX_MASKS:
            self._masks.popitem(last=False)
        return mask


class Constraint:
    """Where one reply stands in its form."""

    def __init__(self, form: Form, stop_ids: tuple[int, ...]):
        self._form = form
        self._stop_ids = stop_ids
        self._state = form.grammar.start

    @property
    def is_complete(self) -> bool:
        """True if the reply so far is a whole value."""
        return self._form.grammar.is_complete(self._state)

    def forbidden(self) -> Tensor:
        """Tokens (V,), bool, that must not come next; at least one may. Not to be written to."""
        return self._form.forbidden(self._state, self._stop_ids)

    def feed(self, token: int) -> None:
        """Go on by a token that was allowed; a stop token changes nothing."""
        if token not in self._stop_ids:
            for byte in self._form.token_bytes[token]:
                self._state = self._form.grammar.step(self._state, byte)


class Forms:
    """The forms asked for over one vocabulary; the last few are kept, for all requests with the same schema."""

    def __init__(self, token_bytes: Sequence[bytes]):
        self._token_bytes = token_bytes
        self._trie: Trie | None = None
        self._forms: OrderedDict[str, Form] = OrderedDict()

    def constraint(self, schema: Mapping[str, Any] | bool, stop_ids: Sequence[int]) -> Constraint:
        """A new reply's constraint.

        stop_ids: tokens that may come when the form is complete; ids that the vocabulary does not have are passed over.
        Raises UsageError for a schema outside the supported part of JSON Schema (`lyceum.engine.schema`), and where a
        reply could get stuck: no stop token, or a byte that no token stands for.
        """
        stops = tuple(stop for stop in stop_ids if 0 <= stop < len(self._token_bytes))
        if not stops:
            raise UsageError(
                "nothing could end the JSON: there is no stop token", hint="give the end token in stop_ids"
            )
        key = json.dumps(schema)  # the order of properties counts
        form = self._forms.pop(key, None)
        if form is None or form.grammar.num_states > MAX_STATES:
            self._trie = self._trie or self._new_trie()
            form = Form(grammar_of(schema), self._trie, self._token_bytes)
        self._forms[key] = form
        if len(self._forms) > MAX_FORMS:
            self._forms.popitem(last=False)
        return Constraint(form, stops)

    def _new_trie(self) -> Trie:
        missing = set(range(256)) - {text[0] for text in self._token_bytes if len(text) == 1}
        if missing:
            raise UsageError(
                f"the vocabulary has no token for the byte {min(missing)} alone, so not all JSON could be written",
                hint="a byte-level vocabulary has one for each of the 256 bytes",
            )
        return Trie(self._token_bytes)
