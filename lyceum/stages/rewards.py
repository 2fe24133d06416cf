"""Where rewards come from: a reward model, a rule that checks the answer, any Python function, or several of them.

    [grpo]
    rewards = { exact_answer = 1.0, "rewards.py:brevity" = 0.1 }      # name = weight; none named = the reward model

    def brevity(prompts, responses, meta):     # rewards.py, beside the recipe; or package.module:function
        return [-len(text) / 100 for text in responses]

One protocol (`RewardSource`): prompts and responses as ids, one number for each response, or None for one that cannot be
scored. A function that a recipe names gets texts instead: what was last said to the model, what it answered (without its
end token), and what the prompt's record says in `meta`. It runs with all of your rights.

What cannot be scored is left out of the update and counted, never guessed: None, NaN, and an exception, after which the
function is asked for each response alone, so that one bad response does not cost its neighbours. An infinite number, or
one that is none, is a mistake in the source, and an error.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lyceum import dist
from lyceum.errors import ConfigError, LyceumError, RunError, UsageError, did_you_mean
from lyceum.evals.verify import VERIFIERS, check_pattern
from lyceum.log import log
from lyceum.stages.reward import RewardModel
from lyceum.tokens.chat import TURN_END, TURN_START, ChatFormat

if TYPE_CHECKING:
    from lyceum.run import Work
    from lyceum.tokens.tokenizer import Tokenizer

Ids = Sequence[int]
Score = float | None
TextReward = Callable[[list[str], list[str], list[dict[str, Any]]], Sequence[Score]]

# (prompts, responses, meta), as ids -> for each response one reward for each of its tokens
Dense = Callable[[list[Ids], list[Ids], list[dict[str, Any]]], Sequence[Sequence[float]]]

MODEL = "model"  # the reward model, among the names of `rewards`


@runtime_checkable
class RewardSource(Protocol):
    """Where rewards come from: a reward model, a checker, a queue of people, any function."""

    def score(self, prompts: Sequence[Ids], responses: Sequence[Ids], meta: Sequence[dict[str, Any]]) -> list[Score]:
        """One number for each response, or None for one that cannot be scored (its episode is dropped and counted).

        Args:
            prompts: prompt ids, ending where the response begins.
            responses: response ids, the stop token included where the response has one.
            meta: what the prompt's record says about it.
        """
        ...


def score_function(source: RewardSource | Callable[..., list[Score]]) -> Callable[..., list[Score]]:
    """The scoring function of a reward source, which may be a plain function itself."""
    return source.score if isinstance(source, RewardSource) else source


def checked(scores: Sequence[Score], num_responses: int, who: str = "the reward source") -> list[Score]:
    """One score for each response; NaN becomes None: it cannot be scored.

    Raises:
        UsageError: there are more or fewer scores than responses, or one is no finite number.
    """
    if len(scores) != num_responses:
        raise UsageError(
            f"{who} gave {len(scores)} scores for {num_responses} responses",
            hint="return a list with one number, or None for what cannot be scored, for each response",
        )
    found: list[Score] = []
    for number, value in enumerate(scores):
        try:
            score = None if value is None else float(value)
        except (TypeError, ValueError):
            score = math.inf
        if score is not None and math.isinf(score):
            raise UsageError(
                f"{who} gave {value!r} for response {number}", hint="return None for what cannot be scored"
            )
        found.append(None if score is None or math.isnan(score) else score)
    return found


def dense_rewards(dense: Dense, rows: Sequence[tuple[Ids, Ids, dict[str, Any]]]) -> list[list[float]]:
    """One number for each token of each response; rows are (prompt, response, meta).

    Raises:
        UsageError: the source gave another number of them, or one that is not finite.
    """
    found = dense([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]) if rows else []
    wanted = [len(row[1]) for row in rows]
    if [len(numbers) for numbers in found] != wanted or not all(math.isfinite(n) for row in found for n in row):
        raise UsageError(
            "the dense reward did not give one finite number for each token of each response",
            hint="return a list of numbers for each response, as long as its ids; 0 where nothing is to be said",
        )
    return [[float(number) for number in numbers] for numbers in found]


@dataclass
class FunctionReward:
    """A function of texts as a reward source."""

    name: str
    function: TextReward
    chat: ChatFormat
    has_failed: bool = False  # once: it was warned of

    def score(self, prompts: Sequence[Ids], responses: Sequence[Ids], meta: Sequence[dict[str, Any]]) -> list[Score]:
        """What the function says of the texts; None where it fails on a response alone."""
        asked = [last_turn(self.chat.tokenizer.decode(list(prompt), keep_special=True)) for prompt in prompts]
        texts = [self.chat.parse(response).content for response in responses]
        try:
            return checked(self.function(asked, texts, list(meta)), len(texts), self.name)
        except LyceumError:
            raise
        except Exception as error:
            if not self.has_failed:
                said = f"{type(error).__name__}: {error}"
                log.warning(f"the reward {self.name} failed ({said}); now it is asked for each response alone")
            self.has_failed = True
        return [self._alone(*row) for row in zip(asked, texts, meta, strict=True)]

    def _alone(self, prompt: str, text: str, meta: dict[str, Any]) -> Score:
        try:
            return checked(self.function([prompt], [text], [meta]), 1, self.name)[0]
        except LyceumError:
            raise
        except Exception:
            return None


@dataclass
class Blend:
    """Several reward sources: the weighted sum of their scores, and None where one of them cannot score.

    parts: (name, weight, source). seen: name -> what each said the last time.
    """

    parts: Sequence[tuple[str, float, RewardSource]]
    seen: dict[str, list[Score]] = field(default_factory=dict)

    def score(self, prompts: Sequence[Ids], responses: Sequence[Ids], meta: Sequence[dict[str, Any]]) -> list[Score]:
        """The weighted sums."""
        self.seen = {
            name: checked(source.score(prompts, responses, meta), len(responses), name)
            for name, _, source in self.parts
        }
        weights = [weight for _, weight, _ in self.parts]
        return [
            None if None in row else sum(weight * (score or 0.0) for weight, score in zip(weights, row, strict=True))
            for row in zip(*self.seen.values(), strict=True)
        ]

    def means(self) -> dict[str, float]:
        """`reward/<name>`: the mean of what each source said the last time, over all ranks."""
        known = {name: [score for score in scores if score is not None] for name, scores in self.seen.items()}
        sums = dist.sum_pairs({f"reward/{name}": (sum(scores), len(scores)) for name, scores in known.items()})
        return {name: total / max(count, 1.0) for name, (total, count) in sums.items()}


def load_judge(work: Work, tokenizer: Tokenizer, kind: str, micro_tokens: int) -> RewardModel:
    """The reward model of `work.inputs["reward"]`, which must read the policy's own ids.

    Raises:
        RunError: no reward section comes before. CheckpointError: its tokenizer is another one than the policy's.
    """
    if "reward" not in work.inputs:
        raise RunError(
            f"{kind} takes its rewards from a reward model, and no reward section comes before",
            hint="put a [reward] section before it, or name other rewards: rewards = { exact_answer = 1.0 }",
        )
    return RewardModel.load(work.inputs["reward"] / "checkpoint", micro_tokens=micro_tokens, reads=tokenizer)


def reward_source(
    rewards: Mapping[str, float],
    chat: ChatFormat,
    *,
    model: RewardSource | None = None,
    pattern: str = "",
    folder: Path | None = None,
) -> RewardSource:
    """The reward source that a recipe names.

    Args:
        rewards: name -> weight; a name is `model`, a verifier, `package.module:function` or `file.py:function`.
        model: the reward model, where there is one.
        pattern: what verifiers match responses against.
        folder: where files of functions are looked for, besides the current folder: the recipe's.

    Raises:
        ConfigError: no such verifier, module or function.
    """
    check_pattern(pattern)
    parts: list[tuple[str, float, RewardSource]] = []
    for name, weight in rewards.items():
        if name == MODEL:
            assert model is not None, "the caller has the reward model that it names"
            parts.append((name, weight, model))
        elif name in VERIFIERS:
            parts.append((name, weight, FunctionReward(name, _one_by_one(name, pattern), chat)))
        else:
            parts.append((name, weight, FunctionReward(name, find_function(name, folder), chat)))
    return Blend(parts)


def check_name(name: str) -> None:
    """Refuses a name of a reward that is none: neither known nor of the form module:function."""
    where, _, attribute = name.rpartition(":")
    known = [MODEL, *VERIFIERS]
    if name not in known and not (where and attribute):
        raise ConfigError(
            f"{name!r} is no reward; known are {', '.join(known)}",
            hint=did_you_mean(name, known) or "name a function of yours as module:function or file.py:function",
        )


def find_function(name: str, folder: Path | None = None) -> Callable[..., Any]:
    """The function that `package.module:function` or `path/to/file.py:function` names.

    Raises:
        ConfigError: it is not there, or cannot be imported.
    """
    check_name(name)
    where, _, attribute = name.rpartition(":")
    try:
        module = _from_file(where, folder) if where.endswith(".py") else importlib.import_module(where)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the reward {name!r} cannot be imported: {type(error).__name__}: {error}",
            hint="name an installed module, or a file: rewards.py:function, beside the recipe",
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"{where} has no function {attribute}", hint=did_you_mean(attribute, names))
    return function


def _from_file(where: str, folder: Path | None) -> ModuleType:
    paths = [base / where for base in (folder, Path.cwd()) if base is not None]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ConfigError(
            f"there is no file {where} with rewards, looked for as {' and '.join(map(str, paths))}",
            hint="give its path from the recipe's folder",
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _one_by_one(name: str, pattern: str) -> TextReward:
    verify = VERIFIERS[name]

    def score(prompts: list[str], responses: list[str], meta: list[dict[str, Any]]) -> list[Score]:
        return [verify(*row, pattern) for row in zip(prompts, responses, meta, strict=True)]

    return score


def last_turn(text: str) -> str:
    """What was said last in a prompt that ends with the header of the reply."""
    turns = text.split(TURN_START)
    return turns[-2].partition("\n")[2].split(TURN_END)[0] if len(turns) > 2 else text
