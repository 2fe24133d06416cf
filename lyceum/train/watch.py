"""Watching a run: the recipe's `[watch]` table, trackers beside metrics.jsonl, and when a loss has leapt.

    [watch]
    tensorboard = true       # tensorboard --logdir runs/demo
    wandb = "my project"     # the same numbers, sent to wandb; WANDB_MODE=offline keeps them here
    spike = 8.0              # stop when the loss stays 8 deviations above its mean

The table is part of no section's key: watching a run otherwise neither trains it anew nor changes a number in it. What a
tracker does wrong (a network that is down, a full disk) is said once and stops nothing: metrics.jsonl is the record.

A spike is a loss above its running mean by `spike` standard deviations, SPIKE_STEPS steps in a row: one bad batch passes
by itself, a model that has lost its way does not come back. The loop then stops before that step's update, and has saved
nothing since the spike began. Going on is the person's decision: PaLM's authors (Chowdhery et al. 2022, section 5.1) went
back about 100 steps and left out 200 to 500 batches, because neither the batches nor the state alone was at fault.

What it is not: an experiment tracker of its own (`lyceum runs` reads what lies in the folders).
"""

from __future__ import annotations

import importlib.util
import math
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lyceum import dist
from lyceum.config import Recipe, build, setting
from lyceum.errors import ConfigError
from lyceum.log import log
from lyceum.run import write_text

if TYPE_CHECKING:
    from lyceum.run import Work

SPIKE_STEPS = 3  # steps in a row that make a spike
SPIKE_AFTER = 50  # steps seen before there is a mean to speak of
SPIKE_MEMORY = 50  # steps over which mean and deviation run
SPIKE_FLOOR = 0.01  # least deviation, as a share of the mean: a loss that hardly moves is not strict
PATIENCE_S = 30  # how long wandb may keep a run waiting, when it opens and when it closes


@dataclass(frozen=True)
class WatchConfig:
    """The `[watch]` table of a recipe."""

    tensorboard: bool = setting(False, "write TensorBoard's event files into each section's folder, in tensorboard/")
    wandb: str = setting("", "the wandb project that metrics are sent to; empty = none")
    spike: float = setting(0.0, "deviations above its mean at which a lasting loss stops the run; 0 = never", low=0.0)


def watch_config(recipe: Recipe) -> WatchConfig:
    """The recipe's `[watch]` table.

    Raises:
        ConfigError: a wrong setting, or a tracker whose package is not installed.
    """
    where = f"[watch] in {recipe.path}"
    config = build(WatchConfig, recipe.watch, where)
    for name, is_wanted in (("tensorboard", config.tensorboard), ("wandb", bool(config.wandb))):
        if is_wanted and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"{where} asks for {name}, whose package is not installed",
                hint=f"pip install 'lyceum[watch]' (or pip install {name}), or leave the setting out",
            )
    return config


# -------------------------------------------------------------------------------- trackers


class Trackers:
    """TensorBoard and wandb, as the recipe asks; written by rank 0. Nothing they do wrong reaches the run.

    Args:
        config: which of them.
        work: the section's work; its folder is where they write.
        settings: the section's settings, for the record.
        step: the steps done before; what an earlier attempt wrote after it is written again.
    """

    def __init__(self, config: WatchConfig, work: Work, settings: Mapping[str, Any], step: int) -> None:
        self._open: dict[str, Any] = {}
        if config.tensorboard and dist.is_main():
            with self._unharmed("tensorboard"):
                self._open["tensorboard"] = _TensorBoard(work, step)
        if config.wandb and dist.is_main():
            with self._unharmed("wandb"):
                self._open["wandb"] = _Wandb(config.wandb, work, settings)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """A step's numbers."""
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        for name, tracker in list(self._open.items()):
            with self._unharmed(name):
                tracker.write(step, numbers)

    def close(self, *, failed: bool = False) -> None:
        """Send what is waiting, for PATIENCE_S at most."""
        for name, tracker in list(self._open.items()):
            with self._unharmed(name):
                tracker.close(failed)

    @contextmanager
    def _unharmed(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a tracker raises: the run is worth more
            self._open.pop(name, None)
            said = f"{type(error).__name__}: {_one_line(error)}"
            log.warning(f"{name} failed and is left out from here on; metrics.jsonl has every number ({said})")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class _TensorBoard:
    def __init__(self, work: Work, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(work.folder.path / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)
        self.writer.flush()  # a killed run has shown what it logged

    def close(self, failed: bool) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, project: str, work: Work, settings: Mapping[str, Any]) -> None:
        import wandb

        id_file = work.folder.trainer / "wandb.txt"  # a resumed run goes on in the same curve
        if not id_file.exists():
            write_text(id_file, secrets.token_hex(8))
        options = {
            "project": project,
            "id": id_file.read_text(encoding="utf-8").strip(),
            "resume": "allow",
            "name": f"{work.recipe.name}/{work.folder.path.name}",
            "group": work.recipe.name,
            "dir": str(work.folder.path),
            "config": dict(settings),
            "settings": wandb.Settings(
                console="off", silent=True, init_timeout=PATIENCE_S, login_timeout=PATIENCE_S, finish_timeout=PATIENCE_S
            ),
        }
        try:
            self.run = wandb.init(**options)
        except Exception as error:
            log.warning(
                f"wandb cannot be reached; `wandb sync` can send the run from {options['dir']} later ({_one_line(error)})"
            )
            wandb.teardown()  # its service still holds the run's id
            self.run = wandb.init(**options, mode="offline")

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


# -------------------------------------------------------------------------------- spikes


class Spike:
    """Whether the loss has leapt and stays up; `state` is all it remembers, so that a resumed run judges alike.

    Args:
        limit: standard deviations above the running mean; 0 = never.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.state = {"seen": 0.0, "mean": 0.0, "variance": 0.0}
        self.num_high = 0  # steps in a row, this one included

    def see(self, loss: float) -> bool:
        """Judge a step by the steps before it; True if it makes a spike. What is too high does not move the mean."""
        state = self.state
        if self.limit > 0 and state["seen"] >= SPIKE_AFTER and loss > self.threshold():
            self.num_high += 1
            return self.num_high >= SPIKE_STEPS
        self.num_high = 0
        share = max(1.0 / (state["seen"] + 1.0), 1.0 / SPIKE_MEMORY)  # a plain mean until the memory is full
        away = loss - state["mean"]
        state["seen"] += 1.0
        state["mean"] += share * away
        state["variance"] = (1.0 - share) * (state["variance"] + share * away * away)
        return False

    def threshold(self) -> float:
        """The loss that is too high."""
        mean = self.state["mean"]
        return mean + self.limit * max(math.sqrt(self.state["variance"]), SPIKE_FLOOR * abs(mean))
