"""One small vocabulary for the tests of this folder, learned from Python source and a few chat turns."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

import pytest

from lyceum.tokens.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    roles = ["system\nuser\nassistant\ntool\n"] * 200
    return Tokenizer.train([inspect.getsource(argparse), *roles, "naïve café — 我想学习 🦙\n\n" * 30], 600)


@pytest.fixture(scope="session")
def saved(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return folder
