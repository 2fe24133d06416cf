from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data sets, where this checkout has one."""
    folder = Path(os.environ.get("LYCEUM_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no shared data sets here (set LYCEUM_DATA to their folder)")
    return folder
