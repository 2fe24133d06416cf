"""The engine: token ids in, more token ids out; knows no text and never trains.

    engine = Engine(model, max_batch=64)
    outputs = engine.generate(prompts, SamplingParams(max_tokens=32, stop_ids=(end,)))  # many, order kept
    engine.add(prompt, params); outputs = engine.step()  # or step by step: those that have finished
    engine.score(rows); engine.encode(rows, at="last"); engine.abort(id); engine.update_weights(model)

PPO's rollouts, the evaluations, the chat and the server share it. A step is: admit, plan, pass, draw, record. One pass
brings the next token of every sequence that decodes and, within a budget, chunks of the prompts of those that came
lately; a prompt's last chunk gives the first token of its reply. What an earlier request left in memory, or a running one
holds, is copied, not computed again: a chat's second turn costs its new tokens, and a prompt asked for eight replies is
read once.

It is one thread's: not safe to call from several. It runs a packed copy of the weights (`lyceum.model.packed`), or where
that is not possible the module itself; it does not run a sharded or wrapped module.

Shapes: B rows, V vocabulary, D width, N tokens of several sequences, one behind the other.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from collections.abc import Sequence as Many
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from lyceum.engine.adjust import Adjustment
from lyceum.engine.cache import MIN_REUSE, Cache, Stretch, most_tokens, num_shared
from lyceum.engine.compiled import Fast, renewed
from lyceum.engine.constrain import Forms
from lyceum.engine.guess import Guesser, guesses, verified
from lyceum.engine.sampling import PLAIN, SamplingParams
from lyceum.engine.scheduler import Scheduler
from lyceum.engine.score import Place, encode_rows, score_rows, score_tokens
from lyceum.engine.sequence import Draw, Drawn, Output, Processor, Scores, Sequence, StopStrings, check_ids
from lyceum.errors import UsageError
from lyceum.model.packed import PackedDecoder, can_pack

STEP_TOKENS = 512  # prompt tokens read in one step while others decode; an idle engine reads IDLE_TOKENS
IDLE_TOKENS = 2048
NUM_KEPT = 8  # sequences on the shelf, or max_batch if that is more


class Engine:
    """Generation, scores and hidden vectors of one model in memory.

    model: a Decoder, or any module with `spec` (vocab_size, context_length), `forward(tokens_BT, cache=None) ->
    hidden_BTD` and `logits(hidden)`. max_batch: most sequences that run at once. token_bytes: bytes of every token,
    needed for stop strings and JSON schemas only. step_tokens: prompt tokens read in one step while others decode: more
    read sooner, fewer keep the others' tokens coming. num_kept: sequences whose keys and values are kept when they leave
    (default: 8, or max_batch if that is more). max_bytes: most memory for keys and values (default: a quarter of the
    machine's). batch_invariant: a reply does not depend on batch mates in its last bit; every sequence then passes alone,
    and nothing is reused. pack: run a packed copy of the weights. half: weights of large matrices are
    rounded to 16 bits, on a CPU while decoding, up to three times as fast (`lyceum.model.product`); scores are the model's own.
    guess: guess tokens that stood here before, check them in one pass (`lyceum.engine.guess`). swift: decode by the way that is
    fastest here, compiled, recorded or not (`lyceum.engine.compiled`); not for what must repeat. checks: of the books, for tests.
    """

    model: Any

    def __init__(
        self,
        model: nn.Module,
        *,
        max_batch: int = 64,
        token_bytes: Many[bytes] | None = None,
        step_tokens: int = STEP_TOKENS,
        num_kept: int | None = None,
        max_bytes: int | None = None,
        batch_invariant: bool = False,
        pack: bool = True,
        half: bool = False,
        guess: bool = False,
        swift: bool = False,
        checks: bool = False,
    ):
        if max_batch < 1:
            raise UsageError(f"max_batch = {max_batch} lets nothing run", hint="max_batch must be 1 or more")
        if step_tokens < 1:
            raise UsageError(f"step_tokens = {step_tokens} reads nothing", hint="step_tokens must be 1 or more")
        self.max_batch = max_batch
        self.token_bytes = token_bytes
        self._forms = Forms(token_bytes) if token_bytes is not None else None
        self.step_tokens = step_tokens
        self.num_kept = 0 if batch_invariant else max(max_batch, NUM_KEPT) if num_kept is None else num_kept
        self.max_bytes = max_bytes
        self.batch_invariant = batch_invariant
        self.pack = pack
        self.half = half
        self.guess = guess and not batch_invariant
        self.swift = swift and not batch_invariant
        self.checks = checks
        self._scheduler = Scheduler(max_batch)
        self._numbers = count()
        self._sequences: dict[int, Sequence] = {}  # those that wait or run
        self._unclaimed: list[Output] = []
        self._draws: dict[int, Draw] = {}
        self._packed: PackedDecoder | None = None
        self._swift: Fast | None = None
        self.update_weights(model)

    def sibling(self) -> Engine:
        """Another engine of the same model and settings, with nothing to do yet; it measures nothing."""
        names = "max_batch token_bytes step_tokens num_kept max_bytes batch_invariant pack half guess checks"
        return Engine(self.model, **{name: getattr(self, name) for name in names.split()})

    # -- requests -----------------------------------------------------------------------------------------------------

    def add(
        self,
        prompt_ids: Many[int],
        params: SamplingParams = PLAIN,
        *,
        key: str = "",
        is_background: bool = False,
        processor: Processor | None = None,
    ) -> int:
        """Queue a request; `step` serves it. Returns its id.

        key: who asks; keys are served evenly, and each finds only what its own requests left in memory. is_background: let
        others go first. processor: changes the logits before a token is drawn.

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
        number = next(self._numbers)
        sequence = Sequence(number, prompt, params, limit, watch, adjustment, key, is_background, processor)
        if self.guess and sequence.is_predictable:
            sequence.guesser = Guesser()
        if limit == 0 and not params.prompt_logprobs:
            self._unclaimed.append(sequence.output())
        else:
            self._sequences[sequence.id] = sequence
            self._scheduler.add(sequence)
        return sequence.id

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Give every running sequence its next token. Returns the replies that are finished, each exactly once."""
        self._admit()
        for decoding, chunks in self._passes():
            self._record(*self._pass(decoding, chunks))
            if chunks:
                self._arrange()
        if self.checks:
            self.check()
        finished, self._unclaimed = self._unclaimed, []
        return finished

    @torch.inference_mode()
    def abort(self, id: int) -> Output | None:
        """Take a request out, at once. Returns what it had; None if it has finished already or never was."""
        sequence = self._sequences.get(id)
        if sequence is None:
            self._unclaimed = [output for output in self._unclaimed if output.id != id]
            return None
        if sequence.row < 0:
            self._scheduler.drop(sequence)
            del self._sequences[id]
        else:
            self._release([sequence])
        if self.checks:
            self.check()
        return sequence.output("abort")

    def reply(self, id: int, start: int = 0) -> list[int]:
        """Ids that a request which has not finished has been given so far, from `start` on."""
        sequence = self._sequences.get(id)
        return [] if sequence is None else sequence.tokens[sequence.num_prompt + start :]

    def so_far(self, id: int) -> Output | None:
        """The same with log-probabilities and the prompt's scores, for those who follow a reply; None once it has finished."""
        sequence = self._sequences.get(id)
        return None if sequence is None else sequence.output("abort")

    @property
    def is_idle(self) -> bool:
        """True if `step` has nothing to do."""
        return not (self._sequences or self._unclaimed)

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

    def score(self, rows: Many[Many[int]], temperature: float = 1.0) -> list[list[float]]:
        """Log-probability of every token but the first given those before it, of logits / temperature.

        Returns len(row) - 1 numbers a row. The primitive under perplexity, multiple choice, KL and reranking.
        """
        return [scores.logprobs for scores in self.scores(rows, temperature)]

    @torch.inference_mode()
    def scores(self, rows: Many[Many[int]], temperature: float = 1.0, *, num_top: int = 0) -> list[Scores]:
        """The same with each token's rank and, beside it, the num_top most probable tokens."""
        for row in rows:
            self._check(row)
        return score_rows(self.model, rows, temperature, num_top, self.device)

    @torch.inference_mode()
    def encode(self, rows: Many[Many[int]], at: Place = "last") -> Tensor | list[Tensor]:
        """Hidden vectors after the final norm: (rows, D) at the last token or averaged, or for "all" a (T, D) each.

        The caller puts the head on: embeddings, reward scores, moderation.
        """
        for row in rows:
            self._check(row)
        return encode_rows(self.model, rows, at, self.device)

    @torch.inference_mode()
    def update_weights(self, model: nn.Module) -> None:
        """From now on use this model's weights; whatever was cached with the old ones is dropped.

        Running sequences go on: what they hold is read again. A training loop that changes the weights in place must call
        this before the next step, with the same module: the engine's copy is refreshed then, in its memory.
        """
        self.model = model
        spec: Any = model.spec
        self.vocab_size: int = spec.vocab_size
        self.context_length: int = spec.context_length
        weight = next(model.parameters(), torch.empty(0))
        self.device = weight.device
        if not (self.pack and can_pack(model)):
            if self.half:
                raise UsageError(
                    "only a packed copy has weights in 16 bits", hint="merge adapters, and leave pack=True"
                )
            self._packed = None
        elif self._packed is not None:
            self._packed.update(model)  # type: ignore[arg-type]
        else:
            self._packed = PackedDecoder(model, half=self.half)  # type: ignore[arg-type]
        self._runner: Any = self._packed or model
        self._swift = renewed(self._swift, self._packed) if self.swift else None
        max_tokens = most_tokens(spec, weight, self.max_bytes)
        self._cache = Cache(self.max_batch, self.device, max_tokens=max_tokens, num_kept=self.num_kept)
        self._draws.clear()
        for sequence in self._scheduler.running:
            sequence.num_cached, sequence.leader = 0, None
        self._scheduler.arrange([s for s in self._scheduler.running if s.num_left == 1])

    # -- the step -----------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        newcomers = self._scheduler.admit(self._fits)
        for sequence in newcomers:
            self._reuse(sequence)
        for sequence in self._scheduler.running[self._scheduler.num_decoding :]:
            leader = sequence.leader
            if leader is not None and (leader.row < 0 or leader.num_cached >= sequence.num_shared):
                sequence.leader = None
                self._reuse(sequence)
                newcomers.append(sequence)
        if newcomers:
            self._arrange()

    def _fits(self, sequence: Sequence) -> bool:
        running = self._scheduler.running
        longest = max([sequence.num_promised, *(other.num_promised for other in running)])
        return self._cache.max_tokens == 0 or (len(running) + 1) * longest <= self._cache.max_tokens

    def _reuse(self, sequence: Sequence) -> None:
        """Copy what the shelf or another slot holds of these tokens; if one that is being read will hold more, wait for it."""
        most = len(sequence.tokens) - 1  # the last one must pass: the next is drawn from what it gives
        if self.batch_invariant or sequence.params.prompt_logprobs or most < MIN_REUSE:
            return
        kept, best = self._cache.shelf.find(sequence.tokens, sequence.key)
        best, source, later = min(best, most), None, 0
        for other in self._scheduler.running:
            if other is sequence or other.key != sequence.key or other.leader is not None:
                continue
            shared = min(most, num_shared(other.tokens, sequence.tokens))
            if (now := min(shared, other.num_cached)) >= max(best, MIN_REUSE):
                best, source = now, other
            is_before = (
                other.id < sequence.id and other.is_background <= sequence.is_background
            )  # so nobody waits in a ring
            if is_before and shared >= later + MIN_REUSE and shared > other.num_cached:
                later, sequence.leader = shared, other
        if best > sequence.num_cached:
            if source is not None:
                self._cache.copy(sequence.row, source.row, sequence.num_cached, best)
            elif kept is not None:
                self._cache.take(sequence.row, kept, best)
            sequence.num_reused += min(best, sequence.num_prompt) - min(sequence.num_cached, sequence.num_prompt)
            sequence.num_cached = best
        sequence.num_shared = later
        if later < sequence.num_cached + MIN_REUSE:
            sequence.leader = None

    def _passes(self) -> Iterator[tuple[list[Sequence], list[tuple[Sequence, int]]]]:
        """Who goes through the model together: those that bring one token each, and chunks of prompts."""
        scheduler = self._scheduler
        if not scheduler.running:
            return
        decoding = scheduler.running[: scheduler.num_decoding]
        if not self.batch_invariant:
            chunks = scheduler.chunks(self.step_tokens if decoding else max(self.step_tokens, IDLE_TOKENS))
            self._cache.reserve(len(scheduler.running), max(len(s.tokens) for s in scheduler.running))
            yield decoding, chunks
            return
        self._cache.reserve(len(scheduler.running), max(len(s.tokens) for s in scheduler.running))
        alone: list[tuple[list[Sequence], list[tuple[Sequence, int]]]] = [([sequence], []) for sequence in decoding]
        budget = self.step_tokens
        for sequence in scheduler.running[scheduler.num_decoding :]:  # a chunk's borders depend on its own prompt alone
            if budget > 0:
                alone.append(([], [(sequence, min(sequence.num_left, self.step_tokens))]))
                budget -= alone[-1][1][0][1]
        yield from alone

    def _pass(self, decoding: list[Sequence], chunks: list[tuple[Sequence, int]]) -> tuple[list[Sequence], Drawn]:
        """One pass and one draw for each sequence that has no tokens left; nothing has changed until the pass succeeded."""
        if self.guess and not chunks and (found := guesses(decoding)):
            return self._verify(decoding, found)
        ids, starts = [sequence.tokens[-1] for sequence in decoding], [sequence.num_cached for sequence in decoding]
        if self._swift is not None and decoding and not chunks:
            now = self._swift.logits(
                ids, starts, self._cache.slots, lambda: self._runner.logits(self._hidden(ids, starts))
            )
            chosen = self._draw(decoding, now)
            for sequence in decoding:
                sequence.num_cached += 1
            return decoding, chosen
        stretches = [Stretch(sequence.row, sequence.num_cached, num) for sequence, num in chunks]
        ends = []
        for sequence, num in chunks:
            ids += sequence.tokens[sequence.num_cached : sequence.num_cached + num]
            ends.append(len(ids) - 1)
        hidden_ND = self._hidden(ids, starts, stretches, first=decoding[0].row if decoding else 0)
        drawing, at = list(decoding), list(range(len(decoding)))
        for (sequence, num), end in zip(chunks, ends, strict=True):
            self._score_prompt(sequence, hidden_ND[end + 1 - num : end + 1])
            if num == sequence.num_left:
                drawing.append(sequence)
                at.append(end)
        drawn: Drawn = ([], [], [])
        if drawing:
            drawn = self._draw(drawing, self._runner.logits(hidden_ND[at] if chunks else hidden_ND))
        for sequence, num in (*((sequence, 1) for sequence in decoding), *chunks):
            sequence.num_cached += num
        return drawing, drawn

    def _verify(self, decoding: list[Sequence], found: list[list[int]]) -> tuple[list[Sequence], Drawn]:
        """A pass over what is guessed to follow: each sequence is drawn for as often as its guesses were right, and once."""
        stretches = [Stretch(s.row, s.num_cached, 1 + len(guess)) for s, guess in zip(decoding, found, strict=True)]
        ids = [id for s, guess in zip(decoding, found, strict=True) for id in (s.tokens[-1], *guess)]
        drawing, drawn = verified(decoding, found, self._runner.logits(self._hidden(ids, [], stretches)), self.device)
        for sequence in drawing:
            sequence.num_cached += 1
        return drawing, drawn

    def _hidden(self, ids: list[int], starts: list[int], chunks: Many[Stretch] = (), *, first: int = 0) -> Tensor:
        window = self._cache.window(starts, chunks, first=first)
        return self._runner(torch.tensor([ids], device=self.device), cache=window)[0]

    def _draw(self, drawing: list[Sequence], logits_BV: Tensor) -> Drawn:
        draw = self._draws.get(drawing[0].id)
        if draw is None or draw.sequences != drawing:
            if not self.batch_invariant:
                self._draws.clear()
            draw = self._draws[drawing[0].id] = Draw(drawing, self.device)
        return draw(logits_BV)

    def _score_prompt(self, sequence: Sequence, hidden_ND: Tensor) -> None:
        if not sequence.params.prompt_logprobs:
            return
        done = len(sequence.prompt_scores.logprobs) - sequence.num_cached  # above 0 after new weights: it is read again
        targets = sequence.tokens[sequence.num_cached + 1 : sequence.num_prompt][: len(hidden_ND)]
        if done < len(targets):
            targets_N = torch.tensor(targets[done:], device=self.device)
            hidden_ND = hidden_ND[done : len(targets)].to(next(self.model.parameters(), hidden_ND).dtype)
            temperature = sequence.params.temperature or 1.0
            more = score_tokens(self.model, hidden_ND, targets_N, temperature, sequence.params.top_logprobs)
            sequence.prompt_scores.extend(more)

    def _record(self, drawing: list[Sequence], drawn: Drawn) -> None:
        """Note the new tokens; replies that are finished leave, and prompts that have been read begin to decode."""
        gone: list[Sequence] = []
        for sequence, token, logprob, top in zip(drawing, *drawn, strict=True):
            if sequence in gone:  # more was guessed right than was wanted
                continue
            if (output := sequence.append(token, logprob, top)) is not None:
                self._unclaimed.append(output)
                gone.append(sequence)
        if gone:
            self._release(gone)

    def _release(self, gone: list[Sequence]) -> None:
        for sequence in gone:
            self._cache.keep(sequence.row, sequence.tokens[: sequence.num_cached], sequence.key)
            del self._sequences[sequence.id]
            self._draws.pop(sequence.id, None)
        self._scheduler.leave(gone)
        self._arrange()

    def _arrange(self) -> None:
        running = self._scheduler.running
        into, out_of = self._scheduler.arrange([sequence for sequence in running if sequence.num_left == 1])
        if into:
            self._cache.move(into, out_of, max(self._scheduler.running[row].num_cached for row in into))

    def _check(self, row: Many[int], forced: Many[int] = ()) -> None:
        check_ids(row, forced, context_length=self.context_length, vocab_size=self.vocab_size)

    def check(self) -> None:
        """Asserts that the books agree: every request in one place, every row free or used, memory within its bound."""
        self._scheduler.check()
        self._cache.check()
        scheduler = self._scheduler
        everyone = {sequence.id: sequence for sequence in (*scheduler.running, *scheduler.waiting())}
        assert everyone == self._sequences, "a request is lost, or kept after its end"
        for sequence in scheduler.running:
            is_decoding = sequence.row < scheduler.num_decoding
            assert (sequence.num_left == 1) == is_decoding and sequence.num_left >= 1, (
                "a sequence stands in a wrong row"
            )
            assert len(sequence.tokens) <= sequence.num_promised, "a sequence has outgrown what was reserved for it"
            assert sequence.leader is None or sequence.leader is not sequence, "a sequence waits for itself"
