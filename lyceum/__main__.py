"""``python -m lyceum``: the same as the ``lyceum`` command; what torchrun starts."""

from __future__ import annotations

import sys

from lyceum.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
