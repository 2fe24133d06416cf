"""The engine: token ids in, more token ids out; knows no text and never trains.

    engine = Engine(model, max_batch=64)
    outputs = engine.generate(prompts, SamplingParams(max_tokens=32, stop_ids=(end,)))  # many, order kept
    engine.add(prompt, params); outputs = engine.step()  # or step by step: those that have finished
    engine.score(rows); engine.encode(rows, at="last"); engine.abort(id); engine.update_weights(model)

PPO's rollouts, the evaluations, the chat and the server share it. A step is: admit, decode, record, release. Every step
decodes one token of every running sequence; a new one has first its prompt, but for the last token, read into the
cache, so that its first token comes out of the same pass as everyone else's next one.

It is one thread's: not safe to call from several. It holds a reference to the model's own weights; a packed copy would
be made in `update_weights`. It does not run a sharded or wrapped module.

Shapes: B rows, T time, D width, V vocabulary, N positions picked out of (B, T).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from collections.abc import Sequence as Many
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lyceum.engine.adjust import Adjustment, adjusted
from lyceum.engine.cache import Cache
from lyceum.engine.constrain import Forms
from lyceum.engine.sampling import PLAIN, SamplingParams, alternatives, sample, uniform
from lyceum.engine.scheduler import Scheduler, groups
from lyceum.engine.sequence import Batch, Finish, Output, Sequence, StopStrings
from lyceum.errors import DataError, UsageError

GROUP_TOKENS = 2048  # padded tokens of one pass over prompts or scored rows: small activations stay in the CPU's cache
LOGIT_CELLS = 1 << 22  # positions x vocabulary of one block of logits in `score`: 16 MB


class Engine:
    """Generation, scores and hidden vectors of one model in memory.

    model: a Decoder, or any module with `spec` (vocab_size, context_length), `forward(tokens_BT, cache=None) ->
    hidden_BTD` and `logits(hidden)`. max_batch: most sequences that run at once. token_bytes: bytes of every token,
    needed for stop strings and JSON schemas only.
    """

    model: Any

    def __init__(self, model: nn.Module, *, max_batch: int = 64, token_bytes: Many[bytes] | None = None):
        if max_batch < 1:
            raise UsageError(f"max_batch = {max_batch} lets nothing run", hint="max_batch must be 1 or more")
        self.max_batch = max_batch
        self.token_bytes = token_bytes
        self._forms = Forms(token_bytes) if token_bytes is not None else None
        self._scheduler = Scheduler(max_batch)
        self._numbers = count()
        self._unclaimed: list[Output] = []
        self.update_weights(model)

    # -- requests -----------------------------------------------------------------------------------------------------

    def add(self, prompt_ids: Many[int], params: SamplingParams = PLAIN) -> int:
        """Queue a request; `step` serves it. Returns its id.

        Raises DataError if the prompt is empty, longer than the context, or holds ids outside the vocabulary; UsageError
        if the request asks for several replies, or for what needs token_bytes.
        """
        prompt = list(prompt_ids)
        self._check(prompt, params.forced)
        if params.n > 1 or params.best_of > 1:
            raise UsageError(
                f"one request gives one reply, n = {params.n}, best_of = {params.best_of} were asked for",
                hint="add each of params.each(), then choose with lyceum.engine.sampling.best",
            )
        if self.token_bytes is None and (params.stop_strings or params.json_schema is not None):
            raise UsageError(
                "stop strings and JSON schemas need the bytes of every token",
                hint="Engine(model, token_bytes=tokenizer.token_bytes)",
            )
        watch = StopStrings(params.stop_strings, self.token_bytes or ()) if params.stop_strings else None
        adjustment = None
        if params.is_adjusted:
            constraint = None
            if params.json_schema is not None and self._forms is not None:
                constraint = self._forms.constraint(params.json_schema, params.stop_ids)
            adjustment = Adjustment(params, prompt, self.vocab_size, constraint)
        limit = min(params.max_tokens, self.context_length - len(prompt))
        sequence = Sequence(next(self._numbers), prompt, params, limit, watch, adjustment)
        if limit == 0:
            about = self._about_prompt(sequence)
            self._unclaimed.append(Output(sequence.id, [], "length", is_biased=params.is_biased, prompt_logprobs=about))
        else:
            self._scheduler.waiting.append(sequence)
        return sequence.id

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Give every running sequence its next token. Returns the replies that are finished, each exactly once."""
        self._admit()
        if self._scheduler.running:
            self._release(self._record(*self._decode()))
        finished, self._unclaimed = self._unclaimed, []
        return finished

    @torch.inference_mode()
    def abort(self, id: int) -> Output | None:
        """Take a request out, at once. Returns what it had; None if it has finished already or never was."""
        for sequence in self._scheduler.waiting:
            if sequence.id == id:
                self._scheduler.waiting.remove(sequence)
                return Output(id, [], "abort", is_biased=sequence.params.is_biased)
        for row, sequence in enumerate(self._scheduler.running):
            if sequence.id == id:
                output = self._output(row, "abort")
                self._release([row])
                return output
        self._unclaimed = [output for output in self._unclaimed if output.id != id]
        return None

    def reply(self, id: int, start: int = 0) -> list[int]:
        """Ids that a request which has not finished has been given so far, from `start` on."""
        for row, sequence in enumerate(self._scheduler.running):
            if sequence.id == id:
                return self._batch.reply(row, start)
        return []

    @property
    def is_idle(self) -> bool:
        """True if `step` has nothing to do."""
        return not (self._scheduler.running or self._scheduler.waiting or self._unclaimed)

    def generate(
        self,
        prompts: Many[Many[int]],
        params: SamplingParams | Many[SamplingParams] = PLAIN,
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Output]:
        """Replies to all prompts, in their order; requests already queued by others are served along the way.

        params: for all, or one for each prompt (the seed is part of it: equal seeds draw equal noise).
        on_progress(finished, all).
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise UsageError(
                f"{len(prompts)} prompts but {len(each)} sampling parameters", hint="give one for all, or one for each"
            )
        for prompt, p in zip(prompts, each, strict=True):
            self._check(list(prompt), p.forced)
        place = {self.add(prompts[i], each[i]): i for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i]))}
        outputs: dict[int, Output] = {}
        others: list[Output] = []
        try:
            while len(outputs) < len(place):
                finished = self.step()
                others += [output for output in finished if output.id not in place]
                outputs.update((place[output.id], output) for output in finished if output.id in place)
                if finished and on_progress is not None:
                    on_progress(len(outputs), len(place))
        finally:
            self._unclaimed += others
            if len(outputs) < len(place):  # an exception, Ctrl-C: nothing of ours stays behind
                for id in place:
                    self.abort(id)
        return [outputs[i] for i in range(len(place))]

    def follow(self, prompt_ids: Many[int], params: SamplingParams = PLAIN) -> Generator[list[int], None, Output]:
        """One reply as it grows: yields new ids; what the last step added is only in the Output that it returns.

        Closing the generator aborts the request.
        """
        id = self.add(prompt_ids, params)
        num_seen = 0
        output: Output | None = None
        try:
            while True:
                finished = self.step()
                output = next((one for one in finished if one.id == id), None)
                self._unclaimed += [one for one in finished if one.id != id]
                if output is not None:
                    return output
                new = self.reply(id, num_seen)
                num_seen += len(new)
                if new:
                    yield new
        finally:
            if output is None:
                self.abort(id)

    # -- whole rows ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def score(self, rows: Many[Many[int]], temperature: float = 1.0) -> list[list[float]]:
        """Log-probability of every token but the first given those before it, of logits / temperature.

        Returns len(row) - 1 numbers a row. The primitive under perplexity, multiple choice, KL and reranking.
        """
        if not temperature > 0:
            raise UsageError(f"temperature = {temperature} cannot be scored with", hint="temperature must be above 0")
        scores: list[list[float]] = [[] for _ in rows]
        for indices, tokens_BT, lengths_B in self._grouped(rows):
            if tokens_BT.shape[1] < 2:
                continue
            hidden_BTD = self.model(tokens_BT[:, :-1])
            is_real_BT = torch.arange(1, tokens_BT.shape[1], device=self.device) < lengths_B.unsqueeze(1)
            hidden_ND, targets_N = hidden_BTD[is_real_BT], tokens_BT[:, 1:][is_real_BT]
            logprobs_N = self._chosen(hidden_ND, targets_N, temperature)
            for i, part in zip(indices, logprobs_N.split((lengths_B - 1).tolist()), strict=True):
                scores[i] = part.tolist()
        return scores

    @torch.inference_mode()
    def encode(self, rows: Many[Many[int]], at: Literal["last", "mean", "all"] = "last") -> Tensor | list[Tensor]:
        """Hidden vectors after the final norm: (rows, D) at the last token or averaged, or for "all" a (T, D) each.

        The caller puts the head on: embeddings, reward scores, moderation.
        """
        if at not in ("last", "mean", "all"):
            raise UsageError(
                f"at = {at!r} is no place to take hidden vectors", hint="at must be 'last', 'mean' or 'all'"
            )
        vectors: list[Tensor] = [torch.empty(0)] * len(rows)
        for indices, tokens_BT, lengths_B in self._grouped(rows):
            hidden_BTD = self.model(tokens_BT)
            for i, hidden_TD, length in zip(indices, hidden_BTD, lengths_B.tolist(), strict=True):
                real_TD = hidden_TD[:length]
                vectors[i] = real_TD.clone() if at == "all" else real_TD[-1] if at == "last" else real_TD.mean(0)
        return vectors if at == "all" else torch.stack(vectors) if vectors else torch.empty(0, 0)

    @torch.inference_mode()
    def update_weights(self, model: nn.Module) -> None:
        """From now on use this model's weights; whatever was cached with the old ones is dropped.

        Running sequences go on: what they hold is read again. The engine refers to the module it is given, so a
        training loop that changes the weights in place must call this before the next step, with the same module.
        """
        self.model = model
        self.vocab_size: int = model.spec.vocab_size  # type: ignore[union-attr,assignment]
        self.context_length: int = model.spec.context_length  # type: ignore[union-attr,assignment]
        parameter = next(model.parameters(), torch.empty(0))
        self.device = parameter.device
        self._cache = Cache(self.max_batch, self.device)
        if not self._scheduler.running:
            self._batch = Batch(self.max_batch, self.device)
        else:
            self._read(0, [self._so_far(row)[:-1] for row in range(len(self._scheduler.running))])

    # -- the step -----------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        newcomers = self._scheduler.next()
        if not newcomers:
            return
        first = len(self._scheduler.running)
        self._read(first, [sequence.prompt[:-1] for sequence in newcomers])
        self._batch.write(first, newcomers)
        self._scheduler.start(newcomers)
        self._note_needs()

    def _read(self, first: int, rows: list[list[int]]) -> None:
        """Put tokens into empty slots first, first + 1, ...; rows that are equal within a group are computed once."""
        self._cache.clear(first, len(rows))
        for group in groups([len(row) for row in rows], GROUP_TOKENS):
            part = [tuple(row) for row in rows[group]]
            distinct = list(dict.fromkeys(part))
            slot = first + group.start
            tokens_BT, lengths_B = self._pad(distinct)
            if tokens_BT.shape[1] > 0:
                self.model(tokens_BT, cache=self._cache.window(slot, len(distinct), tokens_BT.shape[1]))
            self._cache.advance(slot, lengths_B)
            number = {row: i for i, row in enumerate(distinct)}
            self._cache.spread(slot, [number[row] for row in part])

    def _decode(self) -> tuple[Tensor, Tensor, list[list[tuple[int, float]]]]:
        """One pass over all running sequences and one draw for each; changes nothing until it has succeeded."""
        n, batch = len(self._scheduler.running), self._batch
        hidden_BTD = self.model(batch.last_B[:n, None], cache=self._cache.window(0, n, 1))
        logits_BV = self.model.logits(hidden_BTD[:, -1])
        running = self._scheduler.running
        adjusted_BV = adjusted(logits_BV, [one.adjustment for one in running]) if self._needs_adjusting else None
        tokens_B, logprobs_B = sample(
            logits_BV,
            batch.temperature_B[:n],
            uniform(batch.seed_B[:n], batch.position_B[:n]) if self._needs_noise else None,
            has_greedy=self._has_greedy,
            top_k_B=batch.top_k_B[:n] if self._needs_filters else None,
            top_p_B=batch.top_p_B[:n] if self._needs_filters else None,
            min_p_B=batch.min_p_B[:n] if self._needs_min_p else None,
            adjusted_BV=adjusted_BV,
            planned_B=batch.planned(n) if self._needs_forced else None,
        )
        top: list[list[tuple[int, float]]] = []
        if num := max(sequence.params.top_logprobs for sequence in running):
            ids_BK, top_BK = alternatives(logits_BV, batch.temperature_B[:n], tokens_B, logprobs_B, num)
            top = [list(zip(*row, strict=True)) for row in zip(ids_BK.tolist(), top_BK.tolist(), strict=True)]
        self._cache.advance(0, torch.ones_like(tokens_B))
        return tokens_B, logprobs_B, top

    def _record(self, tokens_B: Tensor, logprobs_B: Tensor, top: list[list[tuple[int, float]]]) -> list[int]:
        """Note the new tokens; returns the rows whose reply is finished, having put their outputs aside."""
        is_stop_B, is_full_B = self._batch.append(tokens_B, logprobs_B)
        if self._needs_adjusting:
            self._feed_adjustments(tokens_B)
        for sequence, alternatives_K in zip(self._scheduler.running, top, strict=bool(top)):
            sequence.top_logprobs.append(alternatives_K[: sequence.params.top_logprobs])
        matches = self._match_stop_strings(tokens_B) if self._needs_stop_strings else {}
        done = (is_stop_B | is_full_B).nonzero().flatten().tolist()
        for row in sorted({*done, *matches}):
            if row in matches:
                output = self._output(row, "stop", *matches[row])
            elif is_stop_B[row]:
                output = self._output(row, "stop", int(tokens_B[row]))
            else:
                output = self._output(row, "length")
            self._unclaimed.append(output)
        return sorted({*done, *matches})

    def _feed_adjustments(self, tokens_B: Tensor) -> None:
        num_replies = self._batch.num_reply_B[: len(tokens_B)].tolist()
        for sequence, token, num_reply in zip(self._scheduler.running, tokens_B.tolist(), num_replies, strict=True):
            if sequence.adjustment is not None:
                sequence.adjustment.feed(token, is_drawn=num_reply > len(sequence.params.forced))

    def _match_stop_strings(self, tokens_B: Tensor) -> dict[int, tuple[str, int]]:
        matches = {}
        for row, (sequence, token) in enumerate(zip(self._scheduler.running, tokens_B.tolist(), strict=True)):
            if sequence.stop_strings is None:
                continue
            if int(self._batch.num_reply_B[row]) <= max(len(sequence.params.forced), sequence.params.min_tokens):
                sequence.stop_strings.skip(token)
            elif (match := sequence.stop_strings.feed(token)) is not None:
                matches[row] = match
        return matches

    def _output(self, row: int, finish: Finish, stop: int | str | None = None, text_bytes: int | None = None) -> Output:
        sequence, ids = self._scheduler.running[row], self._batch.reply(row)
        params = sequence.params
        return Output(
            id=sequence.id,
            ids=ids,
            finish=finish,
            logprobs=self._batch.logprobs(row) if params.logprobs else [],
            num_forced=min(len(params.forced), len(ids)),
            is_biased=params.is_biased,
            stop=stop,
            text_bytes=text_bytes,
            top_logprobs=sequence.top_logprobs if params.top_logprobs else [],
            prompt_logprobs=self._about_prompt(sequence),
        )

    def _about_prompt(self, sequence: Sequence) -> list[float]:
        if not sequence.params.prompt_logprobs:
            return []
        return self.score([sequence.prompt], sequence.params.temperature or 1.0)[0]

    def _release(self, rows: list[int]) -> None:
        if not rows:
            return
        into, out_of = self._scheduler.leave(rows)
        if into:
            self._cache.move(into, out_of)
            self._batch.move(into, out_of)

    def _note_needs(self) -> None:
        # only when sequences join: after some have left, a step may do more than is needed, never less
        running = [sequence.params for sequence in self._scheduler.running]
        self._needs_noise = any(params.temperature > 0 for params in running)
        self._has_greedy = any(params.temperature == 0 for params in running)
        self._needs_filters = any(params.top_k > 0 or params.top_p < 1 for params in running)
        self._needs_min_p = any(params.min_p > 0 for params in running)
        self._needs_adjusting = any(params.is_adjusted for params in running)
        self._needs_forced = any(params.forced for params in running)
        self._needs_stop_strings = any(params.stop_strings for params in running)

    # -- rows ---------------------------------------------------------------------------------------------------------

    def _so_far(self, row: int) -> list[int]:
        return self._scheduler.running[row].prompt + self._batch.reply(row)

    def _check(self, row: Many[int], forced: Many[int] = ()) -> None:
        if not row:
            raise DataError("the prompt is empty", hint="begin with at least one token, such as the end-of-text token")
        if len(row) > self.context_length:
            raise DataError(
                f"{len(row)} tokens do not fit the model's context of {self.context_length}",
                hint="shorten the text, or use a model with a longer context",
            )
        for ids in (row, forced):
            if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
                raise DataError(
                    f"token ids {min(ids)}..{max(ids)} are outside the model's vocabulary of {self.vocab_size}",
                    hint="was the text encoded with another tokenizer?",
                )

    def _pad(self, rows: Many[Many[int]]) -> tuple[Tensor, Tensor]:
        width = max(len(row) for row in rows)
        padded = [[*row, *([0] * (width - len(row)))] for row in rows]
        lengths_B = torch.tensor([len(row) for row in rows], device=self.device)
        return torch.tensor(padded, dtype=torch.long, device=self.device).view(len(rows), width), lengths_B

    def _grouped(self, rows: Many[Many[int]]) -> Generator[tuple[list[int], Tensor, Tensor], None, None]:
        """Rows of similar length together, right padded: their indices, tokens_BT, lengths_B."""
        for row in rows:
            self._check(row)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for group in groups([len(rows[i]) for i in order], GROUP_TOKENS):
            indices = order[group]
            yield indices, *self._pad([rows[i] for i in indices])

    def _chosen(self, hidden_ND: Tensor, targets_N: Tensor, temperature: float) -> Tensor:
        block = max(1, LOGIT_CELLS // self.vocab_size)
        parts = []
        for start in range(0, len(targets_N), block):
            logits_NV = self.model.logits(hidden_ND[start : start + block]).float() / temperature
            chosen_N = logits_NV.gather(1, targets_N[start : start + block, None]).squeeze(1)
            parts.append(chosen_N - logits_NV.logsumexp(1))
        return torch.cat(parts)
