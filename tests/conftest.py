"""What all tests share: the machine set up as the command line does it, and one rank unless a test says otherwise."""

from __future__ import annotations

import os
import signal

from hypothesis import settings

from lyceum import device

for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
    os.environ.pop(name, None)
device.prepare("test")  # before any test imports torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits SIGINT ignored

settings.register_profile("lyceum", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("lyceum")
