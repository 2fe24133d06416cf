"""One small vocabulary and its chat format for the tests of this folder."""

from __future__ import annotations

import pytest

from lyceum.tokens.chat import ChatFormat
from lyceum.tokens.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["what does len return? it returns the number of items.\nuser\nassistant\n" * 20], 300)


@pytest.fixture(scope="session")
def chat(tokenizer: Tokenizer) -> ChatFormat:
    return ChatFormat(tokenizer)
