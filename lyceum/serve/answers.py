"""What clients get: the objects of OpenAI's API, whole or as chunks of a stream.

    growing = Growing(token_bytes, params); piece, tokens = growing.feed(ids); ...; growing.close(output)

`Growing` is one reply as text: what of it is certain, and which of its tokens stand before that. Whole answers and streams
are made by the same one, so that all pieces together are the whole text. Tokens are named so that no two of one list have the
same name: by their text, a special one by its spelling, a part of a character as `bytes:\\xe6\\x88`.

Everything is written in ASCII: some readers of event streams take U+2028 or U+0085 for the end of a line.

What it is not: requests (`lyceum.serve.protocol`).
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Sequence
from typing import Any

from lyceum.engine.sampling import SamplingParams
from lyceum.engine.sequence import Output, Top
from lyceum.engine.stream import TextStream

FINISH = {"stop": "stop", "length": "length", "context": "length"}  # the engine's words -> OpenAI's
LEAST = -9999.0  # what stands for minus infinity, which JSON has not
DONE = b"data: [DONE]\n\n"


def event(content: Any) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


def named_event(content: Any) -> bytes:
    """One event of a stream whose events have types: the type stands before it, too."""
    return f"event: {content['type']}\n".encode() + event(content)


class Growing:
    """One reply as it is made: its text, and its tokens up to where the text is certain.

    hold_at: tokens from which on no text is shown. is_text_only: leave the token that stops it out of its tokens.
    """

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        params: SamplingParams,
        *,
        hold_at: Sequence[int] = (),
        is_text_only: bool = True,
    ):
        self.ids: list[int] = []
        self.offsets: list[int] = []  # characters of the text before each token
        self.text = ""  # shown so far
        self._stream = TextStream(token_bytes, stop_strings=params.stop_strings, hold_at=hold_at)
        self._token_bytes = token_bytes
        self._num_settled = max(params.min_tokens, len(params.forced))  # among so many tokens nothing stops
        self._longest_stop = max((len(stop.encode()) for stop in params.stop_strings), default=1)
        self._is_text_only = is_text_only
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_characters = 0
        self._starts: list[int] = []  # bytes of the reply before each token
        self._num_bytes = 0
        self._num_shown = 0  # tokens

    def feed(self, ids: Sequence[int]) -> tuple[str, range]:
        """Add tokens. Returns the text that is certain now, and the numbers of the tokens that have become so."""
        piece = ""
        settled = max(0, self._num_settled - len(self.ids))
        for part, may_stop in ((ids[:settled], False), (ids[settled:], True)):
            if part:
                piece += self._stream.feed(part, may_stop=may_stop)
        for token in ids:
            self._starts.append(self._num_bytes)
            self.offsets.append(self._num_characters)
            self._num_bytes += len(self._token_bytes[token])
            self._num_characters += len(self._decoder.decode(self._token_bytes[token]))
        self.ids += ids
        self.text += piece
        # a stop string that is not complete begins at the earliest so many bytes before the end
        return piece, self._up_to(self._num_bytes - self._longest_stop + 1)

    def close(self, output: Output) -> tuple[str, range]:
        """The reply has ended, and this is it. Returns the rest."""
        piece, first = self.feed(output.ids[len(self.ids) :])
        rest = self._stream.close()
        self.text += rest
        end = self._num_bytes if output.text_bytes is None else output.text_bytes
        last = self._up_to(end, is_last=True)
        if output.text_bytes is None and self._is_text_only and isinstance(output.stop, int):
            last = range(last.start, min(last.stop, len(self.ids) - 1))
        return piece + rest, range(first.start, max(first.start, last.stop))

    def _up_to(self, num_bytes: int, is_last: bool = False) -> range:
        start = self._num_shown
        while self._num_shown < len(self.ids) and (
            self._starts[self._num_shown] < num_bytes
            # nothing more can come before a token without bytes that stands at the end
            or (is_last and self._starts[self._num_shown] == num_bytes == self._num_bytes)
        ):
            self._num_shown += 1
        return range(start, self._num_shown)


# -- log-probabilities -------------------------------------------------------------------------------------------------


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, LEAST) if math.isfinite(logprob) else LEAST


def token_name(tokenizer: Any, token: int) -> str:
    """A token as text, each another."""
    text = tokenizer.token_bytes[token]
    if not text:
        names = {number: name for name, number in tokenizer.special_ids.items()}
        return names.get(token, f"<|{token}|>")
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


def chat_logprobs(
    tokenizer: Any, ids: Sequence[int], logprobs: Sequence[float], top: Sequence[Top]
) -> list[dict[str, Any]]:
    """`logprobs.content` of a chat: of each token its name, bytes, log-probability, and those beside it."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_name(tokenizer, token),
            "logprob": finite(logprob),
            "bytes": list(tokenizer.token_bytes[token]),
        }

    beside = top or [[]] * len(ids)
    return [
        {**one(token, logprob), "top_logprobs": [one(*other) for other in others]}
        for token, logprob, others in zip(ids, logprobs, beside, strict=True)
    ]


def text_logprobs(
    tokenizer: Any,
    ids: Sequence[int],
    logprobs: Sequence[float | None],
    top: Sequence[Top],
    offsets: Sequence[int],
) -> dict[str, Any]:
    """`logprobs` of a completion, for tokens that begin at these characters of the text.

    The chosen token is always among `top_logprobs`, with the very same number: so lm-evaluation-harness sees what was
    greedy. Of a text's first token there is no log-probability, which is null.
    """
    names = [token_name(tokenizer, token) for token in ids]
    beside: list[dict[str, float] | None] = []
    for name, logprob, others in zip(names, logprobs, top or [[]] * len(ids), strict=True):
        if logprob is None:
            beside.append(None)
            continue
        found = {token_name(tokenizer, token): finite(number) for token, number in others}
        beside.append({**found, name: finite(logprob)})
    return {
        "tokens": names,
        "token_logprobs": [None if logprob is None else finite(logprob) for logprob in logprobs],
        "top_logprobs": beside,
        "text_offset": list(offsets),
    }


# -- usage -------------------------------------------------------------------------------------------------------------


def usage(num_prompt: int, num_completion: int, num_cached: int = 0) -> dict[str, Any]:
    """What a request used, in tokens. num_cached: of the prompt, what was remembered and not read again."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": num_cached},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }
