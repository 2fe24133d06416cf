"""What all tests share: the machine set up as the command line does it, and one rank unless a test says otherwise."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import settings

from lyceum import device

for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
    os.environ.pop(name, None)
# before any test imports torch; processes of pytest that run side by side share the cores
device.prepare("test", max(1, device.num_cores() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits SIGINT ignored

settings.register_profile("lyceum", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("lyceum")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The whole river first: it takes longest, and processes that share the tests should not wait for it at the end."""
    items.sort(key=lambda item: item.path.name != "test_end_to_end.py")
