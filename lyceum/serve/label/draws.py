"""Answers of the served models, drawn where the queue wants them, in the background of everybody else's.

    draws = Draws(service, labels); draws.wake()        # when a task has been asked for, or has ended
    await draws.close()

The models that the rules name take turns (all that chat, where they name none), beginning with one drawn by lot. A prompt that a
model cannot read, being longer than its context, gets no more draws: people write its answers.

What it is not: what is wanted (`lyceum.serve.label.tree`).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any

from lyceum.log import log
from lyceum.serve.chat import chat_of, check_size
from lyceum.serve.label.queue import Labels
from lyceum.serve.label.rules import DRAWS, Rules
from lyceum.serve.label.tree import Node, Tree, Want, conversation, path_to
from lyceum.serve.models import Served
from lyceum.serve.protocol import Sampled
from lyceum.serve.refusals import Refusal
from lyceum.serve.sampled import params_of
from lyceum.serve.service import Service, off_loop
from lyceum.serve.wishes import EXACT

REST_S = 5.0  # after a failure
Drawn = tuple[str, str, dict[str, Any]]  # text, model, parameters


class Draws:
    """What draws answers for one server. Two servers of one store may draw for the same message: then it has more."""

    def __init__(self, service: Service, labels: Labels):
        self.service, self.labels = service, labels
        self._task: asyncio.Task[None] | None = None
        self._is_called = False

    def wake(self) -> None:
        """Look for what is wanted, now or as soon as the round under way is over."""
        self._is_called = True
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Give up what is under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while self._is_called:
            self._is_called = False
            for tree, nodes, want in await asyncio.to_thread(self.labels.to_draw):
                try:
                    await self._answer(tree, nodes, want)
                    self._is_called = True  # there may be more behind them
                except Exception as error:
                    log.warning(f"answers to rank could not be drawn: {type(error).__name__}: {error}")
                    await asyncio.sleep(REST_S)

    async def _answer(self, tree: Tree, nodes: Sequence[Node], want: Want) -> None:
        rules = await asyncio.to_thread(self._rules)
        drawn: list[Drawn] = []
        num = want.missing
        try:
            served = self._models(rules)
            for model in served:
                places = [place for place in range(want.missing) if served[place % len(served)] is model]
                if places:
                    drawn += await self._drawn(model, tree, nodes, want.node, len(places), rules)
        except Refusal as error:
            if error.status == 429 or error.status >= 500:
                raise
            log.warning(f"no model can answer a prompt of the labelling page: {error}")
            num = DRAWS * rules.answers
        await asyncio.to_thread(self.labels.drawn, want.node, num, drawn)

    def _rules(self) -> Rules:
        with self.labels.database.reading() as connection:
            return self.labels.rules(connection)

    def _models(self, rules: Rules) -> list[Served]:
        """The models that answer, in an order by lot: those of the rules that are served, else all. Raises Refusal."""
        chatting = [served for served in self.service.models.values() if served.chat is not None]
        named = [served for served in chatting if served.name in rules.models] or chatting
        if not named:
            raise Refusal(400, "No model that is served chats.", code="unsupported_model")
        return sorted(named, key=lambda served: secrets.randbits(32))

    async def _drawn(
        self, served: Served, tree: Tree, nodes: Sequence[Node], node: str, num: int, rules: Rules
    ) -> list[Drawn]:
        format = chat_of(served)
        talk = conversation(tree, path_to({one.id: one for one in nodes}, node))
        size = sum(len(message.content) for message in talk.messages)
        check_size(size, served, "messages")
        ids = await off_loop(size, lambda: format.prompt(talk))
        longest = min(rules.max_tokens, max(1, served.context_length - len(ids)))
        seeds = [secrets.randbelow(EXACT) for _ in range(num)]
        wanted = [
            (
                ids,
                params_of(
                    Sampled(model=served.name, temperature=rules.temperature, seed=seed), served, max_tokens=longest
                ),
            )
            for seed in seeds
        ]
        job = await self.service.open(served, wanted, is_background=True)
        try:
            outputs = await job.outputs()
        finally:
            job.close()
        about = {"temperature": rules.temperature, "max_tokens": longest, "checkpoint": served.fingerprint}
        return [
            (format.parse(output.ids).content, served.name, {**about, "seed": seed, "finish": output.finish})
            for output, seed in zip(outputs, seeds, strict=True)
        ]
