"""Completions: texts or tokens in, how they go on out; with the prompt's own log-probabilities, or what belongs in a hole.

    completion = await Completion.open(service, request, caller)
    await completion.whole()        # or: async for chunk in completion.chunks(): ...

`echo` with `logprobs` is how others measure a model through this API: lm-evaluation-harness sends token lists with
`max_tokens: 1`, adds up the prompt's log-probabilities, and leaves out exactly one token at the end. So one token is always
made where one was asked for (a prompt that leaves no room for it is refused), and a token that stops a reply has its
log-probability like any other.

`suffix` is insert: the prompt is written in the infilling format (`lyceum.tokens.infill`), if the model was trained with it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from lyceum.engine.sampling import best
from lyceum.engine.sequence import Output, Top
from lyceum.engine.stream import offsets
from lyceum.serve.answers import FINISH, Growing, text_logprobs, usage
from lyceum.serve.chat import check_size
from lyceum.serve.limits import Caller
from lyceum.serve.models import Served
from lyceum.serve.protocol import CompletionRequest, Prompt
from lyceum.serve.refusals import Refusal, unsupported
from lyceum.serve.sampled import each_prompt, params_of
from lyceum.serve.service import Answering, Service, off_loop
from lyceum.tokens.infill import arrange

MAX_TOKENS = 16  # where none are asked for


class Completion(Answering):
    """A request for completions, under way. `close` it."""

    def __init__(self, served: Served, request: CompletionRequest, prompts: list[list[int]]):
        self.served, self.request, self.prompts = served, request, prompts
        self.num_wanted = request.n or 1  # of each prompt
        self.num_drawn = max(request.best_of or 0, self.num_wanted)
        self.echoed = [served.tokenizer.decode(prompt) if request.echo else "" for prompt in prompts]
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": f"fp_{served.fingerprint}",
        }

    @classmethod
    async def open(cls, service: Service, request: CompletionRequest, caller: Caller) -> Completion:
        """Let a request in. Raises Refusal, or what the engine says of it."""
        served = await service.find(request.model, caller)
        if request.suffix and not served.can_insert:
            raise unsupported("suffix", f"the model {served.name!r} was not trained to fill a hole (infill_rate)")
        size = sum(map(len, request.prompt)) + len(request.suffix or "")
        if len(request.prompt) * (request.n or 1) > service.limits.replies:
            raise Refusal(
                400,
                f"{len(request.prompt)} prompts with {request.n or 1} replies each, at most {service.limits.replies} in all.",
                param="prompt",
            )
        for prompt in request.prompt:
            check_size(len(prompt), served, "prompt")
        prompts = await off_loop(size, lambda: read_prompts(request.prompt, request.suffix or "", served))
        completion = cls(served, request, prompts)
        longest = MAX_TOKENS if request.max_tokens is None else request.max_tokens
        wants_scores = request.logprobs is not None
        params = params_of(
            request,
            served,
            max_tokens=min(longest, service.limits.max_tokens or longest, served.context_length),
            best_of=request.best_of or 0,
            logprobs=wants_scores,
            top_logprobs=request.logprobs or 0,
            prompt_logprobs=bool(request.echo) and wants_scores,
        )
        each = each_prompt(params, len(prompts), request.seed is not None)
        completion.job = await service.open(
            served,
            [(prompt, one) for prompt, these in zip(prompts, each, strict=True) for one in these],
            caller,
            param="prompt",
            is_background=not request.stream,
            follows=bool(request.stream),
            wants_scores=wants_scores,
        )
        return completion

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        outputs = await self.job.outputs()
        choices: list[dict[str, Any]] = []
        for number in range(len(self.prompts)):
            drawn = outputs[number * self.num_drawn : (number + 1) * self.num_drawn]
            chosen: Sequence[int] = range(self.num_wanted)
            if self.num_drawn > self.num_wanted:
                chosen = best([output.logprobs for output in drawn], self.num_wanted)
            for place in chosen:
                growing = self._growing(number * self.num_drawn + place)
                piece, tokens = growing.close(drawn[place])
                choices.append(
                    {
                        "text": self.echoed[number] + piece,
                        "index": len(choices),
                        "logprobs": self._logprobs(number, growing, drawn[place], tokens, bool(self.request.echo)),
                        "finish_reason": FINISH[drawn[place].finish],
                    }
                )
        return {**self.head, "choices": choices, "usage": self.usage(outputs)}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The answer as it grows: what each event of the stream says."""
        head: dict[str, Any] = {**self.head, "usage": None} if self.request.wants_usage else self.head
        replies = [self._growing(place) for place in range(len(self.job.wanted))]
        is_new = [bool(self.request.echo)] * len(replies)
        outputs: list[Output] = []
        async for one in self.job:
            growing = replies[one.place]
            number = one.place // self.num_drawn
            piece, tokens = growing.feed(one.ids) if one.output is None else growing.close(one.output)
            logprobs = self._logprobs(number, growing, one.so_far, tokens, is_new[one.place])
            if is_new[one.place]:
                piece = self.echoed[number] + piece
                is_new[one.place] = False
            finish = None
            if one.output is not None:
                outputs.append(one.output)
                finish = FINISH[one.output.finish]
            if piece or finish or (logprobs and logprobs["tokens"]):
                choice = {"text": piece, "index": one.place, "logprobs": logprobs, "finish_reason": finish}
                yield {**head, "choices": [choice]}
        if len(outputs) == len(replies) and self.request.wants_usage:
            yield {**head, "choices": [], "usage": self.usage(outputs)}

    def usage(self, outputs: Sequence[Output]) -> dict[str, Any]:
        """What all replies used, those drawn and not chosen too; each prompt counts once."""
        firsts = (outputs[number * self.num_drawn] for number in range(len(self.prompts)))
        num_completion = sum(len(output.ids) for output in outputs)
        return usage(sum(map(len, self.prompts)), num_completion, sum(output.num_reused for output in firsts))

    def _growing(self, place: int) -> Growing:
        params = self.job.wanted[place][1]
        return Growing(self.served.tokenizer.token_bytes, params, is_text_only=False)

    def _logprobs(
        self, number: int, growing: Growing, output: Output | None, tokens: range, with_prompt: bool
    ) -> dict[str, Any] | None:
        if self.request.logprobs is None or output is None:
            return None
        part = slice(tokens.start, tokens.stop)
        start = len(self.echoed[number])
        tokenizer, prompt = self.served.tokenizer, self.prompts[number]
        ids, places = output.ids[part], [start + offset for offset in growing.offsets[part]]
        logprobs: list[float | None] = list(output.logprobs[part])
        top: list[Top] = list(output.top_logprobs[part]) or [[]] * len(ids)
        if with_prompt and output.prompt is not None:
            ids = [*prompt, *ids]
            logprobs = [None, *output.prompt.logprobs, *logprobs]
            top = [[], *(output.prompt.top or [[]] * (len(prompt) - 1)), *top]
            places = [*offsets(tokenizer.token_bytes, prompt), *places]
        return text_logprobs(tokenizer, ids, logprobs, top, places)


def read_prompts(prompts: Prompt, suffix: str, served: Served) -> list[list[int]]:
    """Prompts as ids; an empty one is the end-of-text token, after which documents begin.

    With a suffix each is the prompt for what stands between. Raises Refusal for ids that are none.
    """
    tokenizer = served.tokenizer
    found = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        check_ids(ids, served, "prompt")
        if suffix:
            asked = arrange(ids, (), tokenizer.encode(suffix), tokenizer, prefix_late=False)
            ids = [tokenizer.end_id, *asked[:-1]]
        found.append(ids or [tokenizer.end_id])
    return found


def check_ids(ids: Sequence[int], served: Served, param: str) -> None:
    """Raises Refusal where ids are outside the model's vocabulary."""
    size = served.engine.vocab_size
    if ids and not 0 <= min(ids) <= max(ids) < size:
        raise Refusal(400, f"Token ids go from 0 to {size - 1} here.", param=param, code="invalid_value")
