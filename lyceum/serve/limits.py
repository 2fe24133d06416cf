"""What a client may do: bounds on a request, scopes, and how much at once.

    limits = Limits(); quota = Quota(limits, room=64); quota.take(caller, num_sequences, num_tokens)

**Bounds** are numbers in one place (`Limits`); the protocol's own (at most 4 stop strings, 20 alternatives, ...) stand with
the fields in `lyceum.serve.protocol`.

**A caller** is who asks: the owner of a key (`lyceum.serve.porter` finds it), and what that key may do.

**Quota** counts what each caller has running and how many tokens it was promised lately.

What it is not: users and passwords, or keys (`lyceum.serve.keys`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lyceum.serve.refusals import Refusal

# list models and cut text; make text, and keep files; read the server's numbers; train models; watch runs; run the labelling
SCOPES = ("models", "inference", "metrics", "training", "runs", "admin")
MIN_KEY = 32  # characters of a key that somebody chose, where the address is public


@dataclass(frozen=True)
class Limits:
    """Bounds that keep one client from taking what belongs to all.

    body_bytes: of one request. header_bytes: of its headers. items: values in one body, lists and objects counted too (its
    depth is bounded by the reader: 200). replies: sequences that one request may ask for. max_tokens: longest reply; 0 is
    the model's context. running, waiting: sequences of all callers that may run or wait, beyond the engine's own rows.
    per_caller: sequences of one caller. tokens_per_minute: tokens of one caller, prompts and replies; 0 for no bound.
    header_s, body_s: seconds in which a request must have come. stall_s: seconds that a client may leave the answer
    unread. connections: open at once. upload_bytes: of one file's form; line_bytes: of one line of a file of lines. files,
    files_bytes: that one owner may keep. jobs: of one owner that wait or run.
    """

    body_bytes: int = 8 << 20
    header_bytes: int = 32 << 10
    items: int = 1 << 20
    replies: int = 256
    max_tokens: int = 0
    waiting: int = 256
    per_caller: int = 256
    tokens_per_minute: int = 0
    header_s: float = 15.0
    body_s: float = 30.0
    stall_s: float = 30.0
    connections: int = 512
    upload_bytes: int = 512 << 20
    line_bytes: int = 4 << 20
    files: int = 1000
    files_bytes: int = 4 << 30
    jobs: int = 20


@dataclass(frozen=True)
class Caller:
    """Who asks: the owner of what it makes, and what it may do. Its id is the engine's key too: fairness and memory."""

    id: str
    scopes: frozenset[str] = frozenset(SCOPES)

    def need(self, scope: str) -> None:
        """Raises Refusal unless this caller has the scope."""
        if scope not in self.scopes:
            raise Refusal(
                403,
                f"You have insufficient permissions for this operation. Missing scopes: {scope}.",
                code="missing_scope",
            )


EVERYBODY = Caller("everybody")  # where no keys are asked for


@dataclass
class Account:
    """What one caller has. level: tokens it may still ask for, as of `at`."""

    running: int = 0
    level: float = 0.0
    at: float = 0.0


@dataclass
class Quota:
    """Who has how much; all on one thread. clock: seconds."""

    limits: Limits
    room: int  # sequences that may run or wait, of all callers
    clock: Callable[[], float] = time.monotonic
    running: int = 0
    seconds: float = 1.0  # what a sequence took lately
    accounts: dict[str, Account] = field(default_factory=dict)

    def take(self, caller: Caller, num_sequences: int, num_tokens: int) -> None:
        """Let a request in, for what it may come to. Raises Refusal (429) where it is too much now."""
        if self.running + num_sequences > self.room and self.running:
            raise Refusal(
                429, "The server is busy: its queue is full.", code="rate_limit_exceeded", retry_after_s=self._wait()
            )
        account = self.accounts.get(caller.id) or self._open(caller)
        if account.running + num_sequences > self.limits.per_caller and account.running:
            raise Refusal(
                429,
                f"You have {account.running} replies under way, of {self.limits.per_caller}.",
                code="rate_limit_exceeded",
                retry_after_s=self._wait(),
            )
        if rate := self.limits.tokens_per_minute:
            now = self.clock()
            account.level = min(float(rate), account.level + (now - account.at) * rate / 60)
            account.at = now
            wanted = min(num_tokens, rate)
            if wanted > account.level:
                raise Refusal(
                    429,
                    f"You have used your {rate} tokens a minute.",
                    code="rate_limit_exceeded",
                    retry_after_s=(wanted - account.level) * 60 / rate,
                )
            account.level -= wanted
        account.running += num_sequences
        self.running += num_sequences

    def give_back(self, caller: Caller, num_sequences: int, unused_tokens: int = 0, seconds: float = 0.0) -> None:
        """A request's sequences have ended, after some seconds, with tokens that it was promised and did not use."""
        account = self.accounts[caller.id]
        account.running -= num_sequences
        account.level = min(float(self.limits.tokens_per_minute), account.level + unused_tokens)
        self.running -= num_sequences
        if seconds:
            self.seconds += 0.1 * (seconds - self.seconds)
        if not account.running and not self.limits.tokens_per_minute:
            del self.accounts[caller.id]

    def _open(self, caller: Caller) -> Account:
        account = self.accounts[caller.id] = Account(level=self.limits.tokens_per_minute, at=self.clock())
        return account

    def _wait(self) -> float:
        return min(60.0, max(1.0, self.seconds))
