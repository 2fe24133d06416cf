"""The corpus section: a list of steps from sources to two files of documents, with every drop counted.

    code:    packages, folder -> Codex filters -> exact and near duplicates -> cap in megabytes -> train / valid
    docs:    survey -> studied objects -> six layouts each, folder -> exact duplicates -> train / valid
    others:  sources -> Codex filters on code -> exact duplicates -> train / valid, one document after the other

What: `run` writes documents-train.jsonl and documents-valid.jsonl (`meta.part`: "code", "docs" or a source), objects.jsonl
(the studied facts), others.jsonl (facts of objects that are not studied, with a short sentence), names.json (real names
that are not studied, and other names of studied objects) and returns the report. Why: a corpus that cannot say what
it dropped for which reason cannot be judged.

Code is split by document. Of the docs, one layout of a stated share of objects is held out: the fact is in the training
text, in other words. Code and docs are made in memory; `sources` may be larger than it: of them only a hash of each
document is kept, about 100 bytes. How often each part is seen is the pretraining section's business
(`lyceum.corpus.mixture`).

How to run: `lyceum corpus RECIPE`. Not here: resuming; the section is written whole.
"""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from lyceum.config import setting
from lyceum.corpus import describe, sources
from lyceum.corpus.clean import clean_code, reason_to_drop
from lyceum.corpus.cut import cut
from lyceum.corpus.dedup import Found, exact_duplicates, near_duplicates, normalised
from lyceum.corpus.mixture import key_of, permuted
from lyceum.corpus.packages import STDLIB, ObjectFact, Survey
from lyceum.corpus.records import Document, content_id, write_records
from lyceum.corpus.rows import json_line
from lyceum.errors import ConfigError, DataError, did_you_mean
from lyceum.log import Progress, log, progress
from lyceum.run import Work, line_writer, write_json

PARTS = ("docs", "code")
SIDES = ("train", "valid")
MIN_CUT = 1000  # characters: a shorter document is not cut to hold out its end
NUM_OTHERS = 2500  # of the unstudied objects, those called most are described; those with a short sentence are kept
SHORT_WORDS = 25


@dataclass(frozen=True)
class CorpusConfig:
    """What the assistant reads."""

    packages: tuple[str, ...] = setting(
        ("stdlib",), 'Packages to study: "stdlib", "builtins", or the name of any installed package.'
    )
    folder: str = setting("", "A folder whose text and code files are read as well; empty for none.")
    sources: dict[str, str] = setting(
        {}, 'Texts by part, of any size: name -> a file, a folder, or a data set "hub:name:config:split".'
    )
    columns: dict[str, str] = setting(
        {}, "Source -> the column that holds its text, where no usual name (text, content, ...) says so."
    )
    source_mb: float = setting(0.0, "At most this many megabytes are taken of each source; 0 for all.", low=0.0)
    objects: int = setting(500, "How many objects are studied: those the packages call most.", low=1)
    code_mb: float = setting(8.0, "At most this many megabytes of source code are kept (0 for none).", low=0.0)
    near_duplicates: float = setting(
        0.8,
        "Code files whose word 5-shingles have at least this Jaccard index are duplicates; 0 for off.",
        low=0.0,
        high=1.0,
    )
    valid_share: float = setting(
        0.03, "The share of code files and of sources' documents held out for validation.", low=0.0, high=0.5
    )
    docs_valid_share: float = setting(
        0.2, "The share of objects of which one rendering is held out for validation.", low=0.0, high=1.0
    )


@dataclass
class _Tally:
    """Documents and bytes by part."""

    documents: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def add(self, document: Document) -> None:
        self.documents[document.meta["part"]] += 1
        self.bytes[document.meta["part"]] += num_bytes(document.text)


@dataclass
class _Account:
    """What happened, step by step, shown on a bar as it happens."""

    bar: Progress
    steps: list[dict[str, Any]] = field(default_factory=list)
    drops: Counter[str] = field(default_factory=Counter)
    removed: list[dict[str, Any]] = field(default_factory=list)
    duplicates: Counter[str] = field(default_factory=Counter)
    replaced: int = 0  # characters that were not UTF-8
    written: dict[str, _Tally] = field(default_factory=lambda: {side: _Tally() for side in SIDES})
    started: float = field(default_factory=time.monotonic)

    def left_out(self) -> Counter[str]:
        return self.drops + Counter({"exact duplicate": self.duplicates["exact"]})

    def step(self, name: str, before: int, after: int) -> None:
        now = time.monotonic()
        self.steps.append({"step": name, "in": before, "out": after, "seconds": round(now - self.started, 3)})
        self.started = now
        log.info(f"corpus: {name}: {before} -> {after}")
        self.bar.update(1, left=after)


def run(config: CorpusConfig, work: Work) -> dict[str, Any]:
    """Makes the corpus in `work.folder` and returns its report.

    Raises:
        ConfigError: `sources` or `columns` do not fit.
        DataError: a package, the folder or a source does not exist or is broken, or nothing is left to learn from.
    """
    _check_sources(config)
    with progress(7 + bool(config.near_duplicates) + len(config.sources), "corpus", unit="step") as bar:
        return _make(config, work, _Account(bar))


def _make(config: CorpusConfig, work: Work, account: _Account) -> dict[str, Any]:
    survey = Survey(config.packages)
    account.step("survey", sum(map(len, survey.modules.values())), len(survey.objects))
    ranked = survey.studied(config.objects + NUM_OTHERS)
    facts, others = ranked[: config.objects], ranked[config.objects :]
    account.step("studied objects", len(survey.objects), len(facts))
    parts = _read(config, survey, facts, account)
    parts["code"] = _code_steps(parts["code"], config, work.seed, account)
    parts["docs"] = _without(parts["docs"], exact_duplicates(_texts(parts["docs"])), "exact", account)
    account.step("exact duplicates of docs", len(parts["docs"]) + account.duplicates["exact docs"], len(parts["docs"]))
    if not any(parts.values()) and not config.sources:
        searched = ", ".join(config.packages) or "no package"
        hint = 'name a package with documentation, such as "stdlib", or a folder with .txt, .md, .py or .jsonl files'
        what = f"nothing usable in {searched} and folder {config.folder!r}{_dropped(account.drops)}"
        raise DataError(f"the corpus is empty: {what}", hint=hint)
    train, valid = split(parts, config, work.seed)
    folder = work.folder.path
    sides = chain(zip(repeat("train"), train), zip(repeat("valid"), valid), _stream(config, work.seed, account))
    with ExitStack() as stack:
        files = {side: stack.enter_context(line_writer(folder / f"documents-{side}.jsonl")) for side in SIDES}
        for side, document in sides:
            files[side](json_line(document.to_json()))
            account.written[side].add(document)
    write_records(folder / "objects.jsonl", facts)
    others = [fact for fact in others if len(fact.summary.split()) <= SHORT_WORDS]
    write_records(folder / "others.jsonl", others)
    names = _names(survey, facts)
    write_json(folder / "names.json", names)
    written = [account.written[side].documents.total() for side in SIDES]
    account.step("train and valid", sum(written), written[0])
    return _report(config, survey, facts, names, account)


def _read(
    config: CorpusConfig, survey: Survey, facts: list[ObjectFact], account: _Account
) -> dict[str, list[Document]]:
    parts: dict[str, list[Document]] = {part: [] for part in PARTS}
    for fact in facts:
        parts["docs"] += describe.documents(fact)
    if config.code_mb:
        parts["code"] += sources.package_sources(survey)
    if config.folder:
        for document in sources.read_folder(config.folder, account.drops):
            if document.meta["part"] == "docs" or config.code_mb:
                parts[document.meta["part"]].append(document)
                account.replaced += document.meta.get("replaced", 0)
    total = sum(map(len, parts.values()))
    account.step("read", total + sum(account.drops.values()), total)
    return parts


# -------------------------------------------------------------------------------- sources, never in memory


def _check_sources(config: CorpusConfig) -> None:
    for part, place in config.sources.items():
        if not sources.PART_NAME.fullmatch(part):
            hint = "it becomes a file's name: letters, digits, '_', '.' and '-'"
            raise ConfigError(f"[corpus] sources: {part!r} cannot be a part's name", hint=hint)
        if not place.startswith(sources.HUB) and not Path(place).exists():
            hint = f'give a path relative to where the command is started, or "{sources.HUB}name:config:split"'
            raise DataError(f"the source {part!r} is not there", file=place, hint=hint)
    for name in config.columns:
        if name not in config.sources:
            hint = did_you_mean(name, config.sources) or "columns belong to sources: name one there"
            raise ConfigError(f"[corpus] columns: there is no source {name!r}", hint=hint)


def _stream(config: CorpusConfig, seed: int, account: _Account) -> Iterator[tuple[str, Document]]:
    """(side, document) of every source, one source after the other."""
    seen: set[bytes] = set()
    for part, place in config.sources.items():
        counts: Counter[str] = Counter()
        before = account.left_out()
        documents = _usable(sources.read_place(place, account.drops, config.columns.get(part, "")), account, seen)
        if config.source_mb:
            documents = _first_bytes(documents, config.source_mb * 1e6)
        in_part = (replace(document, meta={**document.meta, "part": part}) for document in documents)
        for side, document in sides_of(in_part, config.valid_share, seed):
            counts[side] += 1
            yield side, document
        left_out = account.left_out() - before
        if not counts:
            what = f"the source {part!r} has no usable document{_dropped(left_out)}"
            hint = "it can be text, code, .jsonl, .json, .csv, .tsv or .parquet, in UTF-8"
            raise DataError(what, file=place, hint=hint)
        account.step(f"source {part}", left_out.total() + counts.total(), counts.total())


def _usable(documents: Iterable[Document], account: _Account, seen: set[bytes]) -> Iterator[Document]:
    """Without code that the filters drop, and without what was there before, in this source or in another."""
    for document in documents:
        account.replaced += document.meta.get("replaced", 0)
        reason = reason_to_drop(document.text) if document.meta["part"] == "code" else ""
        if not reason:
            digest = bytes.fromhex(content_id(normalised(document.text)))
            if digest not in seen:
                seen.add(digest)
                yield document
                continue
            account.duplicates["exact"] += 1
        else:
            account.drops[reason] += 1


def _first_bytes(documents: Iterable[Document], most: float) -> Iterator[Document]:
    """The first documents, until they have about `most` bytes; the last one is cut."""
    for document in documents:
        size = num_bytes(document.text)
        if size >= most:
            yield _with_text(document, next(cut(document.text, max(1, int(len(document.text) * most / size)))))
            return
        yield document
        most -= size


def sides_of(documents: Iterable[Document], share: float, seed: int) -> Iterator[tuple[str, Document]]:
    """Each document with its side, "train" or "valid", in one pass that holds one document.

    The side is drawn by seed and text, so more documents do not change the sides of the first. If none is drawn for
    valid, the end of the last one is held out, or all of it if it is short: `share` of all characters, cut where a word
    ends. A source of one book is held out so.
    """
    sizes: Counter[str] = Counter()  # characters
    last: Document | None = None
    side = ""
    for document in documents:
        if last:
            sizes[side] += len(last.text)
            yield side, last
        last = document
        number = int(content_id(document.text)[:16], 16)
        side = "valid" if key_of(seed, "valid", number) < share * 2**64 else "train"
    if not last:
        return
    if not sizes["train"]:
        side = "train"
    if share > 0 and not sizes["valid"]:
        wanted = round(share * (sizes["train"] + len(last.text)))
        if len(last.text) >= max(MIN_CUT, 2 * wanted):
            head = next(cut(last.text, len(last.text) - wanted))
            yield "train", _with_text(last, head)
            side, last = "valid", _with_text(last, last.text[len(head) :])
        elif sizes["train"]:
            side = "valid"
    yield side, last


def _with_text(document: Document, text: str) -> Document:
    return document if text == document.text else Document(text, meta=document.meta)


def _dropped(drops: Mapping[str, int]) -> str:
    said = ", ".join(f"{number} {reason}" for reason, number in drops.items() if number)
    return f"; left out: {said}" if said else ""


# -------------------------------------------------------------------------------- code and docs


def _code_steps(code: list[Document], config: CorpusConfig, seed: int, account: _Account) -> list[Document]:
    before, code = len(code), list(clean_code(code, account.drops))
    account.step("code filters", before, len(code))
    before, code = len(code), _without(code, exact_duplicates(_texts(code)), "exact", account)
    account.step("exact duplicates of code", before, len(code))
    if config.near_duplicates:
        before = len(code)
        code = _without(code, near_duplicates(_texts(code), config.near_duplicates), "near", account)
        account.step(f"near duplicates of code (Jaccard {config.near_duplicates:g})", before, len(code))
    before, code = len(code), capped(code, config.code_mb * 1e6, seed)
    account.drops["over the cap"] += before - len(code)
    account.step(f"cap of {config.code_mb:g} MB", before, len(code))
    return code


def num_bytes(text: str) -> int:
    """Bytes of a text as UTF-8."""
    return len(text.encode("utf-8", "surrogatepass"))


def _texts(documents: Iterable[Document]) -> list[str]:
    return [document.text for document in documents]


def _without(documents: list[Document], found: Found, kind: str, account: _Account) -> list[Document]:
    part = documents[0].meta["part"] if documents else ""
    account.duplicates[kind] += len(found.removed)
    account.duplicates[f"{kind} {part}"] += len(found.removed)
    for removed in found.removed:
        names = [_title(documents[index]) for index in (removed.index, removed.survivor)]
        account.removed.append({"removed": names[0], "for": names[1], "similarity": round(removed.similarity, 3)})
    return [documents[index] for index in found.kept]


def _title(document: Document) -> str:
    meta = document.meta
    return meta.get("path") or f"{meta.get('object', document.id)} ({meta.get('layout', 'document')})"


def capped(documents: list[Document], most_bytes: float, seed: int) -> list[Document]:
    """As many documents as fit in `most_bytes` of UTF-8, drawn by the seed, in their old order."""
    left, kept = most_bytes, []
    for turn in range(len(documents)):
        index = permuted(len(documents), key_of(seed, "cap"), turn)
        size = num_bytes(documents[index].text)
        if size <= left:
            left -= size
            kept.append(index)
    return [documents[index] for index in sorted(kept)]


def split(parts: dict[str, list[Document]], config: CorpusConfig, seed: int) -> tuple[list[Document], list[Document]]:
    """Train and valid documents: code by document, docs by holding out one layout of some objects.

    A document without an object (from the folder) is split like code. At least one document of every part that has two
    stays on each side, if its share is above 0. Both lists are in the order of the parts.
    """
    train: list[Document] = []
    valid: list[Document] = []
    for part, documents in parts.items():
        held_out = _held_out([d for d in documents if "object" in d.meta], config.docs_valid_share, seed)
        whole = [document for document in documents if "object" not in document.meta]
        count = round(len(whole) * config.valid_share)
        if config.valid_share > 0 and len(whole) > 1:
            count = max(1, count)
        held_out |= {whole[permuted(len(whole), key_of(seed, "valid", part), n)].id for n in range(count)}
        train += [document for document in documents if document.id not in held_out]
        valid += [document for document in documents if document.id in held_out]
    return train, valid


def _held_out(documents: list[Document], share: float, seed: int) -> set[str]:
    """Ids of one layout each of a share of the objects; which layout turns with the object."""
    by_object: dict[str, list[Document]] = {}
    for document in documents:
        by_object.setdefault(document.meta["object"], []).append(document)
    names = sorted(name for name, layouts in by_object.items() if len(layouts) > 1)
    chosen = [names[permuted(len(names), key_of(seed, "objects"), n)] for n in range(round(len(names) * share))]
    return {by_object[name][key_of(seed, "layout", name) % len(by_object[name])].id for name in chosen}


def _names(survey: Survey, facts: list[ObjectFact]) -> dict[str, Any]:
    """Real names that are not studied; not among them: modules and classes with something studied inside."""
    studied = {fact.name for fact in facts}
    known = set(studied)
    for name in studied:
        parts = name.split(".")
        known |= {".".join(parts[:size]) for size in range(1, len(parts))}
    aliases = sorted(name for name, public in survey.known.items() if public in studied and name not in studied)
    unstudied = [name for name in survey.names() if name not in known]
    title = " and ".join("the Python standard library" if package == STDLIB else package for package in survey.modules)
    return {"title": title, "unstudied": unstudied, "aliases": aliases}


def _report(
    config: CorpusConfig,
    survey: Survey,
    facts: list[ObjectFact],
    names: dict[str, Any],
    account: _Account,
) -> dict[str, Any]:
    drops = {reason: number for reason, number in account.drops.most_common() if number}
    duplicates = {kind: account.duplicates[kind] for kind in ("exact", "near")}
    tallies = account.written
    parts = dict.fromkeys([*PARTS, *config.sources])
    megabytes = {part: sum(tally.bytes[part] for tally in tallies.values()) / 1e6 for part in parts}
    texts = ", ".join(f"{part} {size:.2f} MB" for part, size in megabytes.items())
    return {
        "documents": {side: dict(tally.documents) for side, tally in tallies.items()},
        "bytes": {side: dict(tally.bytes) for side, tally in tallies.items()},
        "replaced_characters": account.replaced,
        "drops": drops,
        "duplicates": {**duplicates, "removed": account.removed},
        "objects": len(facts),
        "kinds": dict(Counter(fact.kind for fact in facts)),
        "names_unstudied": len(names["unstudied"]),
        "not_imported": survey.failures,
        "python": platform.python_version(),
        "packages": list(config.packages),
        "steps": account.steps,
        "line": (
            f"{len(facts)} objects of {', '.join(config.packages)} (Python {platform.python_version()}); "
            f"{texts}; {sum(drops.values())} files dropped, "
            f"{duplicates['exact']} exact and {duplicates['near']} near duplicates"
        ),
    }
