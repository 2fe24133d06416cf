"""The only training loop: it turns any Stage into updated weights, a checkpoint and a report.

Why one: accumulation, ranks, clipping, schedules, logging, saving and resuming are where training goes quietly wrong,
so they exist once. What a stage is, says `lyceum.train.stage`.

Run by: `run_stage(stage, work)`, the last line of every stage's `run`.

Guarantees, each with a test in `tests/train/test_loop.py`:

- The gradient is that of the sum over terms of weight * total / count, with counts over all micro-batches and ranks:
  cutting a step into other micro-batches, or over other ranks, changes rounding only.
- A run that was killed at any moment and started again has the same losses bit for bit, on the same machine, versions
  and threads.
- A device that runs out of memory in a pass gets smaller micro-batches, said once: the same step as if they had been
  smaller from the start.
- A loss or gradient that is not finite, or a term with nothing to learn from, is a TrainingError before any weight is
  touched; the last saved state stands. So is a loss that has leapt, where the recipe asks for it (`lyceum.train.watch`).
  The rows at fault are then in bad-batch.jsonl.

The trainer state is weights, optimizer, running average, torch's random numbers, and as JSON the step, the totals so far
and `stage.state_dict()`; of a sharded model every rank writes its own part (`lyceum.train.state`).

What it is not: a home for algorithms (no `if` here knows a stage). How a model is cut over ranks is the affair of
`lyceum.train.parallel`. The random state of a GPU is not saved, because nothing that trains here draws from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lyceum import dist
from lyceum.device import matmul_flops, pick_device
from lyceum.errors import ResourceError, RunError, TrainingError
from lyceum.log import Metrics, log, progress, shorten, show_number, show_time
from lyceum.run import Work, plain, write_json, write_lines
from lyceum.train import workers
from lyceum.train.optim import Learner, schedule
from lyceum.train.parallel import Parallel, ranks_together
from lyceum.train.stage import Stage, Step
from lyceum.train.state import STATE, SavedState, environment, random_states, write_state
from lyceum.train.watch import SPIKE_STEPS, Spike, Trackers, watch_config
from lyceum.train.workers import Sums, add, merge

# Keys of a metrics line that depend on the clock; everything else is the same in a resumed run.
TIMINGS = ("seconds", "tokens_per_s", "share_of_limit")


def run_stage(stage: Stage[Any], work: Work) -> dict[str, Any]:
    """Trains `stage` in `work.folder` from where it stands to its end.

    Returns:
        The report: line, steps, tokens, seconds, tokens_per_s, final (last metrics and validation), and what
        `stage.report` adds. A run that had finished already is not loaded again: its report is returned as it was.

    Raises:
        TrainingError: a loss or gradient is not finite, or a loss term has nothing to learn from.
        RunError: the saved state belongs to other settings.
    """
    finished = work.folder.trainer / "finished.json"
    if finished.exists():
        return json.loads(finished.read_text(encoding="utf-8"))
    with ranks_together(work, pick_device()) as parallel:
        report = _Loop(stage, work, parallel).run()
    if dist.is_main():
        write_json(finished, report)
    dist.barrier()
    return report


class _Loop:
    """One run of one stage."""

    def __init__(self, stage: Stage[Any], work: Work, parallel: Parallel) -> None:
        self.stage, self.work, self.config, self.parallel = stage, work, stage.config, parallel
        self.metrics, self.samples = Metrics(work.folder.metrics), Metrics(work.folder.samples)
        self.done = 0  # updates made
        self.tokens = 0  # over all ranks
        self.seconds = 0.0  # of training, over all attempts; validation and saving not counted
        self.final: dict[str, float] = {}  # the last value of every metric
        self.saved_at = 0
        self.watch = watch_config(work.recipe)
        self.spike = Spike(self.watch.spike)
        self.recent: deque[tuple[int, Step[Any]]] = deque(maxlen=SPIKE_STEPS + 1)  # what a spike may have come from
        self.not_finite: list[Any] = []  # the first micro-batch of the step whose loss was not
        self.limit_flops = 0.0  # of the machine, a second, over all ranks; 0 = not measured
        self.halvings = 0  # how often every micro-batch is cut in two, since the device ran out of memory

    # -------------------------------------------------------------------------------- the run

    def run(self) -> dict[str, Any]:
        stage = self.stage
        torch.manual_seed(self.work.seed)
        stage.device = pick_device()
        stage.origin = {"recipe": self.work.recipe.name, "section": self.work.folder.path.name, "seed": self.work.seed}
        stage.start(self.work)
        self._check_start()
        self.parallel.put_on(stage)
        for trained in stage.trained.values():
            trained.module.to(stage.device).train()
        for module in stage.frozen.values():
            module.to(stage.device).eval().requires_grad_(False)
        self.learners = {n: Learner(t.module, t.optimizer, self.config.ema) for n, t in stage.trained.items()}
        is_alone = stage.device.type == "cpu" and not self.parallel.is_sharded
        self.num_workers = workers.num_workers(self.config.micro_tokens) if is_alone else 1
        self._restore()
        self.metrics.cut_back(self.done)
        self.samples.cut_back(self.done)
        if self.done < stage.num_steps and not stage.stop:
            self._measure_limit()
            trackers = Trackers(self.watch, self.work, self._settings(), self.done)
            failed = True
            try:
                self._train(trackers)
                failed = False
            finally:
                trackers.close(failed=failed)
        self._save_model()
        return self._report()

    def _check_start(self) -> None:
        if self.stage.num_steps < 1 or not self.stage.trained:
            raise TrainingError(
                f"{self.stage.kind}: there is not one step to train",
                hint="give it more data or more tokens, or a smaller batch_tokens",
            )

    def _measure_limit(self) -> None:
        """The limit of the machine's arithmetic on the matrices of the trained modules."""
        if self.stage.flops_per_token:
            weights = [w for t in self.stage.trained.values() for w in t.module.parameters() if w.ndim == 2]
            shapes = sorted({(w.shape[0], w.shape[1]) for w in weights}, key=math.prod)[-3:]
            flops = matmul_flops(shapes, self.config.micro_tokens, dtype=weights[0].dtype)
            self.limit_flops = dist.sum_everywhere(flops)
            log.info(f"  matrix products of its shapes: {self.limit_flops / 1e9:,.0f} GFLOP/s, the limit here")

    def _train(self, trackers: Trackers) -> None:
        stage, num_steps = self.stage, self.stage.num_steps
        snapshots = {max(1, round(share * num_steps)): share for share in self.config.snapshots}
        iterator = stage.steps(self.done)
        since_tokens, since_seconds = self.tokens, self.seconds
        with progress(num_steps, stage.kind, unit="", done=self.done) as bar:
            while self.done < num_steps and not stage.stop:
                begun = time.perf_counter()
                step = next(iterator, None)
                assert step is not None, f"{stage.kind}: steps() ended after {self.done} of {num_steps} steps"
                logs = self._is_due(self.config.log_every)
                values = self._update(step, by_term=logs and self._is_due(self.config.norms_every))
                values.update(stage.after_step(values))
                self.done += 1
                self.tokens += step.tokens
                self.seconds += time.perf_counter() - begun
                speed = (self.tokens - since_tokens) / max(self.seconds - since_seconds, 1e-9)
                names = [name for name in (stage.headline, *stage.also_shown) if name in values]
                share = {"of limit": f"{self._share_of_limit(speed):.0%}"} if self.limit_flops else {}
                numbers = {"step": f"{self.done:,}/{num_steps:,}", **{name: values[name] for name in names}}
                bar.update(1, **numbers, **{"tok/s": round(speed)}, **share)
                is_last = self.done == num_steps or stage.stop
                validates = is_last or self.done % (self.config.validate_every or num_steps) == 0
                if validates:
                    values.update(self._validate())
                if logs or validates:
                    values.update(tokens=self.tokens, seconds=self.seconds, tokens_per_s=speed)
                    if self.limit_flops:
                        values["share_of_limit"] = self._share_of_limit(speed)
                    self.metrics.write(self.done, values)
                    trackers.write(self.done, values)
                    self.final.update(values)
                    since_tokens, since_seconds = self.tokens, self.seconds
                if self.done in snapshots:
                    self._save_model(f"snapshot-{snapshots[self.done]:.2f}")
                is_last = is_last or stage.stop  # a validation may have said so
                if is_last or (step.can_resume and self._save_is_due()):
                    self._save()

    def _is_due(self, every: int) -> bool:
        """Whether the coming step is the first, the last, or a multiple of `every`."""
        return self.done == 0 or self.done + 1 == self.stage.num_steps or (self.done + 1) % every == 0

    def _save_is_due(self) -> bool:
        is_due = self.config.save_every > 0 and self.done - self.saved_at >= self.config.save_every
        return is_due and not self.spike.num_high  # what is saved is from before the spike

    def _share_of_limit(self, tokens_per_s: float) -> float:
        return tokens_per_s * self.stage.flops_per_token / self.limit_flops

    # -------------------------------------------------------------------------------- one step

    def _update(self, step: Step[Any], *, by_term: bool) -> dict[str, float]:
        """One optimizer update; returns the step's metrics over all ranks."""
        for _ in range(self.halvings):
            self._halve(step)
        counts = self._counts(step)
        self.stage.before_step(step)
        self.not_finite = []
        if self.watch.spike:
            self.recent.append((self.done + 1, step))
        # Every rank brings its part of each count, so that the sums over ranks are total and count.
        sums = {f"loss/{term}": [0.0, count / dist.data_size()] for term, count in counts.items()}
        sums["loss"] = [0.0, 1.0 / dist.data_size()]
        if by_term and len(counts) > 1 and not self.parallel.is_sharded:  # one pass a micro-batch, as on every rank
            norms = self._backward_by_term(step, counts, sums)
        else:
            norms = self._backward(step, counts, sums)
        values = {name: total / count for name, (total, count) in dist.sum_pairs(sums).items() if count}
        module_norms = {name: learner.norm(learner.gradient) for name, learner in self.learners.items()}
        self._check_finite(step, values, module_norms)
        self._check_spike(values["loss"])
        if len(counts) == 1:
            norms = {term: math.hypot(*module_norms.values()) for term in counts}
        factor = self._factor()
        for name, learner in self.learners.items():
            limit = self.stage.trained[name].clip_norm
            if 0 < limit < module_norms[name]:
                learner.gradient.mul_(limit / module_norms[name])
            learner.update(factor)
            values[f"lr/{name}"] = factor * learner.settings.lr
            if learner.settings.matrix_lr:
                values[f"matrix_lr/{name}"] = factor * learner.settings.matrix_lr
        values.update({f"grad_norm/{term}": norm for term, norm in norms.items()})
        values.update({f"module_grad_norm/{name}": norm for name, norm in module_norms.items()})
        return values

    def _counts(self, step: Step[Any]) -> dict[str, float]:
        """Term -> number of its units in this step, over micro-batches and ranks; none is 0."""
        sums: Sums = {}
        for micro_batch in step.micro_batches:
            for term, count in self.stage.counts(micro_batch).items():
                add(sums, term, count, 0.0)
        counts = {term: total for term, (total, _) in dist.sum_pairs(sums).items()}
        empty = [term for term, count in counts.items() if not count > 0]
        if empty or not counts:
            what = f"has nothing to learn from for {', '.join(empty)}" if empty else "is empty"
            raise TrainingError(
                f"{self.stage.kind}: step {self.done + 1} {what} (no target has weight)",
                hint="see whether the data hold what this stage learns from, and whether it fits into the row length",
            )
        return counts

    def _backward(self, step: Step[Any], counts: dict[str, float], sums: Sums) -> dict[str, float]:
        """Leaves the gradient of the whole loss, summed over ranks, in every learner's `gradient`."""
        spares = self.parallel.spares(step.micro_batches)

        def loss(micro_batch: Any, sums: Sums) -> Tensor:
            first, *others = self._losses(counts, micro_batch, sums).values()
            return sum(others, first)

        def attempt(sums: Sums) -> None:
            for learner in self.learners.values():
                learner.gradient.zero_()
                learner.accumulate_in(learner.gradient)
            piles = workers.deal(step.micro_batches, self.stage.halves, self.num_workers)
            if len(piles) > 1:
                whole = {"": [learner.gradient for learner in self.learners.values()]}
                workers.backward(piles, lambda *its: {"": loss(*its)}, sums, list(self.learners.values()), whole)
                return
            for micro_batch in step.micro_batches:
                loss(micro_batch, sums).backward()
            for spare in spares:
                torch.stack([0.0 * term.total for term in self.stage.loss(spare)[0].values()]).sum().backward()

        self._in_memory(step, sums, attempt)
        for learner in self.learners.values():
            learner.sum_over_ranks(learner.gradient)
        return {}

    def _backward_by_term(self, step: Step[Any], counts: dict[str, float], sums: Sums) -> dict[str, float]:
        """Leaves the same gradient, and returns term -> norm of that term's part of it, over all trained modules."""
        parts = {(t, n): torch.zeros_like(learner.gradient) for t in counts for n, learner in self.learners.items()}

        def attempt(sums: Sums) -> None:
            for part in parts.values():
                part.zero_()
            piles = workers.deal(step.micro_batches, self.stage.halves, self.num_workers)
            into = {term: [parts[term, name] for name in self.learners] for term in counts}
            losses = functools.partial(self._losses, counts)
            workers.backward(piles, losses, sums, list(self.learners.values()), into)

        self._in_memory(step, sums, attempt)
        for (_, name), part in parts.items():
            self.learners[name].sum_over_ranks(part)
        for name, learner in self.learners.items():
            torch.sum(torch.stack([parts[term, name] for term in counts]), 0, out=learner.gradient)
        return {
            t: math.hypot(*(learner.norm(parts[t, name]) for name, learner in self.learners.items())) for t in counts
        }

    def _in_memory(self, step: Step[Any], sums: Sums, attempt: Callable[[Sums], None]) -> None:
        """Goes through this rank's micro-batches; where the device is out of memory, again with all of them halved.

        The counts, and so the gradient, stay those of the whole step. No rank waits for another in here.
        """
        while True:
            found: Sums = {}
            try:
                attempt(found)
            except torch.OutOfMemoryError as error:
                failed = str(error).splitlines()[0]
            else:
                merge(sums, found)
                return
            if self.parallel.is_sharded:  # the other ranks are in the middle of that pass
                raise ResourceError(
                    f"{self.stage.kind}: a micro-batch does not fit into the device's memory: {failed}",
                    hint="lower micro_tokens, or set machine.recompute = true",
                )
            torch.cuda.empty_cache()  # here, where the traceback no longer holds the failed pass
            before = len(step.micro_batches)
            self._halve(step)
            if len(step.micro_batches) == before:
                raise ResourceError(
                    f"{self.stage.kind}: the smallest micro-batch does not fit into the device's memory: {failed}",
                    hint="make the rows or the model smaller; `lyceum plan` says what each part takes",
                )
            if not self.halvings:
                log.warning(f"{self.stage.kind}: out of memory; micro-batches are halved, the steps stay what they are")
            self.halvings += 1

    def _halve(self, step: Step[Any]) -> None:
        step.micro_batches = [half for whole in step.micro_batches for half in self.stage.halves(whole)]

    def _losses(self, counts: dict[str, float], micro_batch: Any, sums: Sums) -> dict[str, Tensor]:
        """Term -> its differentiable share of the step's loss; totals and metrics are added to `sums`."""
        with self.parallel.precision(self.stage):
            terms, metrics = self.stage.loss(micro_batch)
        assert terms and terms.keys() <= counts.keys(), f"{self.stage.kind}: counts() and loss() name other terms"
        losses = {name: term.total * (term.weight / counts[name]) for name, term in terms.items()}
        for name, loss in losses.items():
            add(sums, f"loss/{name}", terms[name].total, 0.0)
            add(sums, "loss", loss, 0.0)
        for name, (total, count) in metrics.items():
            add(sums, name, total, count)
        if not self.not_finite and not math.isfinite(sums["loss"][0]):
            self.not_finite = [micro_batch]
        return losses

    def _check_finite(self, step: Step[Any], values: dict[str, float], module_norms: dict[str, float]) -> None:
        wrong = [name for name, value in values.items() if name.startswith("loss") and not math.isfinite(value)]
        wrong += [f"the gradient of {name}" for name, norm in module_norms.items() if not math.isfinite(norm)]
        if wrong:
            at_fault = self.not_finite if wrong[0].startswith("loss") else step.micro_batches
            rows = self._show_rows((self.done + 1, micro_batch) for micro_batch in at_fault)
            raise TrainingError(
                f"{self.stage.kind}: not a finite number at step {self.done + 1}: {', '.join(wrong)}; {self._kept()}{rows}",
                hint="lower the learning rates (lr, matrix_lr) or raise warmup; metrics.jsonl shows the steps before",
            )

    def _check_spike(self, loss: float) -> None:
        if self.spike.see(loss):
            begun = self.done + 2 - SPIKE_STEPS
            rows = self._show_rows((number, part) for number, step in self.recent for part in step.micro_batches)
            raise TrainingError(
                f"{self.stage.kind}: the loss leapt at step {begun} and stays up: {loss:.4g} at step {self.done + 1}, its "
                f"mean before was {self.spike.state['mean']:.4g}; {self._kept()}{rows}",
                hint="mend what is in those rows, or lower the learning rates (lr, matrix_lr) or clip_norm; to go on from "
                "the saved state all the same, give watch.spike a higher value, or 0",
            )

    def _kept(self) -> str:
        return f"the state saved after step {self.saved_at} stands" if self.saved_at else "no state was saved yet"

    def _show_rows(self, micro_batches: Iterator[tuple[int, Any]]) -> str:
        """Writes the rows of these (step, micro-batch), of all ranks, to bad-batch.jsonl; returns where they are from."""
        own = [{"step": number, **row} for number, part in micro_batches for row in self.stage.describe(part)]
        rows = dist.gather(own)
        if not rows:
            return ""
        path = self.work.folder.path / "bad-batch.jsonl"
        if dist.is_main():
            write_lines(path, [json.dumps(plain(row), ensure_ascii=False) for row in rows])
        names = ", ".join(str(row["row"]) for row in rows[:3])
        return f"; {path} holds its {len(rows)} rows ({names}{', ...' if len(rows) > 3 else ''})"

    def _factor(self) -> float:
        config = self.config
        middle = (self.done + 0.5) / self.stage.num_steps  # of this step: no step is wasted on a rate of 0
        shape = {"warmup": config.warmup, "decay": config.decay, "final": config.final_lr}
        return schedule(middle, shape=config.decay_shape, **shape)

    # -------------------------------------------------------------------------------- beside the steps

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside, the trained modules are in eval mode, hold their running average if there is one, and torch's
        random numbers drawn do not count."""
        for learner in self.learners.values():
            learner.swap()
            learner.module.eval()
        try:
            with torch.random.fork_rng(devices=[]):
                yield
        finally:
            for learner in self.learners.values():
                learner.swap()
                learner.module.train()

    def _validate(self) -> dict[str, float]:
        with self._averaged():
            with torch.no_grad():
                numbers = self.stage.validate()
            with self.parallel.whole(self.stage) as is_whole:
                rows = self.stage.samples() if is_whole and dist.is_main() else []
                dist.barrier()  # which is more patient than the next step's sums
        for row in rows:
            self.samples.write(self.done, row)
        said = [", ".join(f"{name} {show_number(value)}" for name, value in numbers.items())]
        said += [f"{shorten(row.get('prompt'))} -> {shorten(row.get('reply'))}" for row in rows[:1]]
        if any(said):
            log.info(f"  step {self.done:,}: {' | '.join(filter(None, said))}")
        return {f"valid/{name}": float(value) for name, value in numbers.items()}

    def _save_model(self, snapshot: str = "") -> None:
        results = {name: value for name, value in self.final.items() if name.startswith("valid/")}
        self.stage.origin |= {"step": self.done, "results": results}
        with self._averaged():
            if dist.is_main() or self.stage.can_shard:
                self.stage.save(self.work.folder.path, snapshot)
            dist.barrier()

    def _report(self) -> dict[str, Any]:
        stage, final = self.stage, self.final
        headline = f"{stage.headline} {show_number(final[stage.headline])}, " if stage.headline in final else ""
        line = f"{stage.kind}: {headline}{self.done:,} steps, {self.tokens:,} tokens in {show_time(self.seconds)}"
        totals = {"steps": self.done, "tokens": self.tokens, "seconds": self.seconds}
        speed = {"tokens_per_s": self.tokens / max(self.seconds, 1e-9)}
        if self.limit_flops:
            speed |= {"share_of_limit": self._share_of_limit(speed["tokens_per_s"]), "limit_flops": self.limit_flops}
        return {"line": line, **totals, **speed, "final": final, **stage.report(final)}

    # -------------------------------------------------------------------------------- saving and resuming

    def _save(self) -> None:
        """Writes the trainer state, every rank its own part."""
        stage_state = self.stage.state_dict()
        tensors = {f"stage/{key}": value for key, value in stage_state.items() if isinstance(value, Tensor)}
        tensors |= {**self._state_tensors(), "random": random_states()}
        header = {
            "step": self.done,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "final": self.final,
            "stop": self.stage.stop,
            "spike": self.spike.state,
            "halvings": self.halvings,
            "stage": {key: value for key, value in stage_state.items() if not isinstance(value, Tensor)},
            "settings": self._settings(),
            "environment": environment(),
        }
        write_state(self.work.folder.trainer / STATE, tensors, header)
        self.saved_at = self.done
        dist.barrier()

    def _state_tensors(self) -> dict[str, Tensor]:
        learners = self.learners.items()
        return {f"{name}/{key}": value for name, learner in learners for key, value in learner.state_tensors().items()}

    def _settings(self) -> dict[str, Any]:
        """What must be the same for a saved state to be gone on with."""
        values = {**dataclasses.asdict(self.config), "seed": self.work.seed, "num_steps": self.stage.num_steps}
        return json.loads(json.dumps(values, default=str))

    def _restore(self) -> None:
        """Goes on from the saved trainer state, if there is one."""
        path = self.work.folder.trainer / STATE
        if not path.exists():
            return
        saved = SavedState(path)
        header = saved.header
        if header["settings"] != self._settings():
            changed = [k for k, v in self._settings().items() if header["settings"].get(k, v) != v]
            raise RunError(
                f"{path} was made with other settings ({', '.join(changed)})",
                hint="give them back their old values, or move the folder away to train from the start",
            )
        for key, now in environment().items():
            if header["environment"].get(key) != now:
                change = f"{key} {now} instead of {header['environment'].get(key)}"
                log.warning(f"{self.stage.kind} goes on with {change}: losses may differ in their last digits")
        saved.copy_into(self._state_tensors())
        self.stage.load_state_dict({**header["stage"], **saved.below("stage/")})
        self.stage.stop, self.halvings = header["stop"], header.get("halvings", 0)
        self.spike.state.update(header.get("spike", {}))  # an older state has none
        self.done = self.saved_at = header["step"]
        self.tokens, self.seconds, self.final = header["tokens"], header["seconds"], header["final"]
        (random,) = saved.below("random").values()
        torch.set_rng_state(random[dist.data_rank() % len(random)].clone())
        log.info(f"{self.stage.kind}: going on after step {self.done} of {self.stage.num_steps}")
