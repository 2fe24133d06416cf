"""Lyceum schools a language model: from raw text to an assistant, through the four stages that made ChatGPT."""

from __future__ import annotations

__version__ = "0.1.0"
