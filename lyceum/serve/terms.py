"""The search: texts as terms that two databases index alike, Chinese too.

A term is a word in lower case without accents, or, where a script puts no spaces between words (Chinese, Japanese, Korean,
Thai and their neighbours), two neighbouring characters. "GPT模型好" is gpt, 模型, 型好 and 好: every piece of two characters or
more is a row of pairs, and one alone is the beginning of a pair. So a Chinese word of two characters is found, which a
trigram index cannot do.

A query is split at its spaces; each part is a phrase whose last word may go on; all parts must be there, in one message
or one title. SQLite indexes the terms with FTS5, PostgreSQL as a `tsvector`; neither cuts words itself. In SQLite the
owner is a term beside them: another's texts are not even looked at.

What it is not: no stems, no ranking by relevance; the newest come first. Of a text, the first `SEARCHED` characters are found.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

from sqlalchemy import Connection, text

SEARCHED = 50_000  # characters of a text; PostgreSQL holds a megabyte of terms in a row
LONGEST_WORD = 64  # characters; the rest of a longer one (a key, a picture as text) is not looked at
QUERY_TERMS = 64  # terms of a query that are looked for
PARTS = {"messages": "content", "conversations": "title"}  # table -> the column that is searched
BATCH = 500
FEW = 1000  # texts that fit, up to which PostgreSQL's index gives them all

# Scripts without spaces between words: Thai to Tibetan, Burmese, Khmer, kana, Hangul, Han and its extensions.
UNSPACED = (
    (0x0E00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3005, 0x3007), (0x3040, 0x31FF), (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF), (0xAC00, 0xD7FF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF),
)  # fmt: skip


@lru_cache(maxsize=1 << 16)
def _kind(character: str) -> str:
    if any(first <= ord(character) <= last for first, last in UNSPACED):
        return "unspaced" if unicodedata.category(character)[0] in "LMN" else ""
    return "word" if unicodedata.category(character)[0] in "LMN" else ""


def _runs(words: str) -> list[tuple[str, str]]:
    """(kind, characters) of every run of letters, in lower case, full-width forms and accents taken off."""
    plain = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", words).casefold())
    plain = unicodedata.normalize("NFC", "".join(c for c in plain if not "\u0300" <= c <= "\u036f"))
    return [(kind, "".join(run)) for kind, run in groupby(plain, _kind) if kind]


def terms_of(words: str) -> list[str]:
    """The terms of a text, in its order."""
    found = []
    for kind, run in _runs(words[:SEARCHED]):
        if kind == "word":
            found.append(run[:LONGEST_WORD])
        else:
            found += [run[at : at + 2] for at in range(len(run))]
    return found


def phrases_of(query: str) -> list[list[str]]:
    """The phrases of a query, each a list of terms of which the last may be the beginning of one."""
    phrases, left = [], QUERY_TERMS
    for part in query[:SEARCHED].split():
        phrase = terms_of(part)
        runs = _runs(part)
        if runs and runs[-1][0] == "unspaced" and len(runs[-1][1]) > 1:
            phrase.pop()  # the last character is in the pair before it; alone, it would end the run
        if phrase[:left]:
            phrases.append(phrase[:left])
        left -= len(phrase[:left])
    return phrases


def _owner_term(owner: str) -> str:
    return hashlib.blake2b(owner.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


# -------------------------------------------------------------------------------- in the databases


def create(connection: Connection) -> None:
    """Make the index, over all texts that are there."""
    for table in PARTS:
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql(
                f"CREATE VIRTUAL TABLE {table}_terms USING fts5 (owner, terms, tokenize='ascii', prefix='1 2')"
            )
        else:
            connection.exec_driver_sql(f"ALTER TABLE {table} ADD COLUMN terms tsvector")
            connection.exec_driver_sql(f"CREATE INDEX {table}_terms ON {table} USING gin (terms)")
    owners = "SELECT m.number, c.owner, m.content FROM messages m JOIN conversations c ON c.id = m.conversation"
    queries = {"conversations": "SELECT number, owner, title FROM conversations", "messages": owners}
    queries["messages"] += " WHERE m.state <> 'streaming'"
    for table, query in queries.items():
        for rows in connection.execute(text(query)).partitions(BATCH):
            add(connection, table, [(row[0], row[1], row[2]) for row in rows])


def add(connection: Connection, table: str, texts: Sequence[tuple[int, str, str]]) -> None:
    """Index texts, each as (number, owner, text), in place of what their numbers had."""
    if not texts:
        return
    if connection.dialect.name == "sqlite":
        remove(connection, table, [number for number, _, _ in texts])
        rows = [{"n": n, "owner": _owner_term(owner), "terms": " ".join(terms_of(said))} for n, owner, said in texts]
        connection.execute(text(f"INSERT INTO {table}_terms (rowid, owner, terms) VALUES (:n, :owner, :terms)"), rows)
    else:
        rows = [{"n": n, "terms": _vector(terms_of(said))} for n, _, said in texts]
        connection.execute(text(f"UPDATE {table} SET terms = CAST(:terms AS tsvector) WHERE number = :n"), rows)


def remove(connection: Connection, table: str, numbers: Iterable[int]) -> None:
    """Take texts out of the index; PostgreSQL's goes with its row."""
    rows = [{"n": number} for number in numbers]
    if rows and connection.dialect.name == "sqlite":
        connection.execute(text(f"DELETE FROM {table}_terms WHERE rowid = :n"), rows)


def find(
    connection: Connection, table: str, owner: str, query: str, limit: int, before: int | None
) -> list[dict[str, Any]]:
    """The newest rows of an owner whose text fits: id, number, conversation, text; at most `limit`, below `before`."""
    phrases = phrases_of(query)
    if not phrases:
        return []
    column = PARTS[table]
    if table == "messages":
        what, join = "t.id, t.number, t.conversation, t.content", "JOIN conversations c ON c.id = t.conversation"
    else:
        what, join = (
            f"t.id, t.number, t.id AS conversation, t.{column} AS content",
            "JOIN conversations c ON c.id = t.id",
        )
    values: dict[str, Any] = {"owner": owner, "limit": limit, "before": 1 << 62 if before is None else before}
    if connection.dialect.name == "sqlite":  # CROSS JOIN: from the index, newest first, and no further than the limit
        fits = " AND ".join("(" + " + ".join(f'"{term}"' for term in phrase) + " *)" for phrase in phrases)
        values["fits"] = f'owner : "{_owner_term(owner)}" AND terms : ({fits})'
        statement = (
            f"SELECT {what} FROM {table}_terms CROSS JOIN {table} t ON t.number = {table}_terms.rowid {join} "
            f"WHERE {table}_terms MATCH :fits AND {table}_terms.rowid < :before AND c.owner = :owner "
            f"ORDER BY {table}_terms.rowid DESC LIMIT :limit"
        )
    else:
        values["fits"] = " & ".join("(" + " <-> ".join(f"'{term}'" for term in phrase) + ":*)" for phrase in phrases)
        # PostgreSQL knows no share of texts for the beginning of a word, takes a rare one for common, and would read all rows
        # from the newest on. So the index is asked first, in no order: it knows a rare one at once, and where it has found
        # FEW, the newest rows hold enough of them.
        where = (
            f"FROM {table} t {join} WHERE t.terms @@ CAST(:fits AS tsquery) AND t.number < :before AND c.owner = :owner"
        )
        some = connection.execute(text(f"SELECT t.number {where} LIMIT {FEW}"), values).scalars().all()
        if len(some) < FEW:
            values = {"numbers": sorted(some, reverse=True)[:limit]}
            where = f"FROM {table} t {join} WHERE t.number = ANY(:numbers)"
        statement = f"SELECT {what} {where} ORDER BY t.number DESC LIMIT {limit}"
    return [dict(row) for row in connection.execute(text(statement), values).mappings()]


def _vector(terms: Sequence[str]) -> str:
    """Terms as PostgreSQL writes a tsvector: each with its place; places end at 16,383."""
    return " ".join(f"'{term}':{min(place, 16383)}" for place, term in enumerate(terms, 1))
