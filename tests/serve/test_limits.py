"""Bounds and quotas are tested over HTTP in test_guard.py; here is what a caller may do."""

from __future__ import annotations

import pytest

from lyceum.serve.limits import EVERYBODY, Caller
from lyceum.serve.refusals import Refusal


def test_a_caller_may_do_what_its_scopes_say() -> None:
    reader = Caller("ann", frozenset({"models"}))
    reader.need("models")
    EVERYBODY.need("metrics")
    with pytest.raises(Refusal) as refused:
        reader.need("metrics")
    assert refused.value.status == 403 and refused.value.code == "missing_scope"
