"""Speed is measured on a quiet machine: the check that the benchmarks share.

What it is not: proof. A machine that is quiet as a run begins may be busy later; what is compared is measured in turn.
"""

from __future__ import annotations

from lyceum import device

BUSY_LIMIT = 0.10  # share of all cores that others may use


def busy_share(force: bool = False) -> float | None:
    """The share of all cores that others use; None, with a word to the user, where it is too much, unless forced."""
    busy = device.busy_share(2.0)
    if busy > BUSY_LIMIT and not force:
        print(f"the machine is busy: others use {busy:.0%} of its cores, at most {BUSY_LIMIT:.0%} is allowed")
        print("hint: wait until it is quiet, or give --force and do not believe the numbers.")
        return None
    return busy
