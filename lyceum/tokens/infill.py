"""The infilling format: a text with a hole as ids, the prompt that asks for what belongs there, and the text back.

M. Bavarian et al., "Efficient training of language models to fill in the middle" (2022), section 3. A text is cut into
prefix, middle and suffix, and the middle is moved to the end, so that continuing left to right fills the hole::

    PSM   <|fim_prefix|> prefix <|fim_suffix|> suffix <|fim_middle|> middle <|endoftext|>
    SPM   <|fim_prefix|> <|fim_suffix|> suffix <|fim_middle|> prefix middle <|endoftext|>

SPM is the paper's variant 2: PSM of a text whose prefix is empty, and what is generated goes on from the prefix. The end
token says that the middle has reached the suffix; a model that is not taught it never stops. The three texts are encoded
apart, as they are when people ask, and never become special tokens.

    ids = infill_prompt("def add(a, b):\\n    ", "\\n", tokenizer)   # generate until tokenizer.end_id
    prefix, middle, suffix = parse_infill([*ids, *generated], tokenizer)

Not here: which rows of a corpus are written this way (`lyceum.batches.infill`), and sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lyceum.errors import DataError
from lyceum.tokens.tokenizer import Tokenizer


def cut(text: str, draw: Callable[[], float]) -> tuple[str, str, str]:
    """Prefix, middle and suffix of a text, cut at two uniformly random places between (or around) its characters.

    Args:
        text: any; each of the three may be empty.
        draw: gives uniform numbers in [0, 1); asked twice.
    """
    start, stop = sorted(int(draw() * (len(text) + 1)) for _ in range(2))
    return text[:start], text[start:stop], text[stop:]


def arrange(
    prefix: Sequence[int], middle: Sequence[int], suffix: Sequence[int], tokenizer: Tokenizer, *, prefix_late: bool
) -> list[int]:
    """The three encoded parts as one stream, end token included: PSM, or SPM if `prefix_late`."""
    before, after = ((), prefix) if prefix_late else (prefix, ())
    return [
        tokenizer.fim_prefix_id, *before, tokenizer.fim_suffix_id, *suffix,
        tokenizer.fim_middle_id, *after, *middle, tokenizer.end_id,
    ]  # fmt: skip


def infill_prompt(prefix: str, suffix: str, tokenizer: Tokenizer) -> list[int]:
    """The ids after which the missing middle is generated, until the end token: PSM.

    They begin with an end token, after which most documents begin in training; the paper finds that it helps a little.
    """
    asked = arrange(tokenizer.encode(prefix), (), tokenizer.encode(suffix), tokenizer, prefix_late=False)
    return [tokenizer.end_id, *asked[:-1]]


def parse_infill(ids: Sequence[int], tokenizer: Tokenizer) -> tuple[str, str, str]:
    """Prefix, middle and suffix of an arranged text, or of a prompt and what was generated after it.

    Joined they are the text. Of SPM the prefix is empty and the middle begins with it.

    Args:
        ids: an end token before and one after them may be there.

    Raises:
        DataError: the three marks are not all there, once and in order.
    """
    marks = (tokenizer.fim_prefix_id, tokenizer.fim_suffix_id, tokenizer.fim_middle_id)
    found = [(number, place) for place, number in enumerate(ids) if number in marks]
    if tuple(number for number, _ in found) != marks:
        names = " ".join(Tokenizer.SPECIALS[4 + marks.index(number)] for number, _ in found)
        raise DataError(
            f"not a text with a hole: its marks are {names or 'none'}, expected prefix, suffix, middle, once each",
            hint="give the ids of infill_prompt, followed by what was generated",
        )
    (_, first), (_, second), (_, third) = found
    return (
        tokenizer.decode(ids[first + 1 : second]),
        tokenizer.decode(ids[third + 1 :]),
        tokenizer.decode(ids[second + 1 : third]),
    )
