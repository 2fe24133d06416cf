"""The corpus section: a list of steps from sources to two files of documents, with every drop counted.

    code:  sources -> Codex filters -> exact duplicates -> near duplicates -> cap in megabytes -> train / valid
    docs:  survey -> studied objects -> six layouts each -> exact duplicates -> train / valid

What: `run` writes documents-train.jsonl and documents-valid.jsonl (`meta.part` is "code" or "docs"), objects.jsonl
(the studied facts), others.jsonl (facts of objects that are not studied, with a short sentence), names.json (real names
that are not studied, and other names of studied objects) and returns the report. Why: a corpus that cannot say what
it dropped for which reason cannot be judged.

Code is split by document. Of the docs, one layout of a stated share of objects is held out: the fact is in the training
text, in other words. How often each part is seen is the pretraining section's business (`lyceum.corpus.mixture`).

How to run: `lyceum corpus RECIPE`. Not here: resuming; the section takes seconds and is written whole.
"""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lyceum.config import setting
from lyceum.corpus import describe, sources
from lyceum.corpus.clean import clean_code
from lyceum.corpus.dedup import Found, exact_duplicates, near_duplicates
from lyceum.corpus.mixture import key_of, permuted
from lyceum.corpus.packages import STDLIB, ObjectFact, Survey
from lyceum.corpus.records import Document, write_records
from lyceum.errors import DataError
from lyceum.log import Progress, log, progress
from lyceum.run import Work, write_json

PARTS = ("docs", "code")
NUM_OTHERS = 2500  # of the unstudied objects, those called most are described; those with a short sentence are kept
SHORT_WORDS = 25


@dataclass(frozen=True)
class CorpusConfig:
    """What the assistant reads."""

    packages: tuple[str, ...] = setting(
        ("stdlib",), 'Packages to study: "stdlib", "builtins", or the name of any installed package.'
    )
    folder: str = setting("", "A folder whose text and code files are read as well; empty for none.")
    objects: int = setting(500, "How many objects are studied: those the packages call most.", low=1)
    code_mb: float = setting(8.0, "At most this many megabytes of source code are kept (0 for none).", low=0.0)
    near_duplicates: float = setting(
        0.8,
        "Code files whose word 5-shingles have at least this Jaccard index are duplicates; 0 for off.",
        low=0.0,
        high=1.0,
    )
    valid_share: float = setting(0.03, "The share of code files held out for validation.", low=0.0, high=0.5)
    docs_valid_share: float = setting(
        0.2, "The share of objects of which one rendering is held out for validation.", low=0.0, high=1.0
    )


@dataclass
class _Account:
    """What happened, step by step, shown on a bar as it happens."""

    bar: Progress
    steps: list[dict[str, Any]] = field(default_factory=list)
    drops: Counter[str] = field(default_factory=Counter)
    removed: list[dict[str, Any]] = field(default_factory=list)
    duplicates: Counter[str] = field(default_factory=Counter)
    started: float = field(default_factory=time.monotonic)

    def step(self, name: str, before: int, after: int) -> None:
        now = time.monotonic()
        self.steps.append({"step": name, "in": before, "out": after, "seconds": round(now - self.started, 3)})
        self.started = now
        log.info(f"corpus: {name}: {before} -> {after}")
        self.bar.update(1, left=after)


def run(config: CorpusConfig, work: Work) -> dict[str, Any]:
    """Makes the corpus in `work.folder` and returns its report.

    Raises: DataError if a package or the folder does not exist, or if nothing is left to learn from.
    """
    with progress(7 + bool(config.near_duplicates), "corpus", unit="step") as bar:
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
    if not any(parts.values()):
        searched = ", ".join(config.packages) or "no package"
        hint = 'name a package with documentation, such as "stdlib", or a folder with .txt, .md, .py or .jsonl files'
        raise DataError(f"the corpus is empty: nothing usable in {searched} and folder {config.folder!r}", hint=hint)
    train, valid = split(parts, config, work.seed)
    folder = work.folder.path
    write_records(folder / "documents-train.jsonl", train)
    write_records(folder / "documents-valid.jsonl", valid)
    write_records(folder / "objects.jsonl", facts)
    others = [fact for fact in others if len(fact.summary.split()) <= SHORT_WORDS]
    write_records(folder / "others.jsonl", others)
    names = _names(survey, facts)
    write_json(folder / "names.json", names)
    account.step("train and valid", len(train) + len(valid), len(train))
    return _report(config, survey, facts, train, valid, names, account)


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
    total = sum(map(len, parts.values()))
    account.step("read", total + sum(account.drops.values()), total)
    return parts


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
        size = len(documents[index].text.encode("utf-8", "surrogatepass"))
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
    train: list[Document],
    valid: list[Document],
    names: dict[str, Any],
    account: _Account,
) -> dict[str, Any]:
    sides = {"train": train, "valid": valid}
    count = {s: Counter(d.meta["part"] for d in documents) for s, documents in sides.items()}
    size: dict[str, Counter[str]] = {side: Counter() for side in sides}
    for side, documents in sides.items():
        for document in documents:
            size[side][document.meta["part"]] += len(document.text.encode("utf-8", "surrogatepass"))
    drops = {reason: number for reason, number in account.drops.most_common() if number}
    duplicates = {kind: account.duplicates[kind] for kind in ("exact", "near")}
    megabytes = {part: (size["train"][part] + size["valid"][part]) / 1e6 for part in PARTS}
    return {
        "documents": {side: dict(count[side]) for side in sides},
        "bytes": {side: dict(size[side]) for side in sides},
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
            f"docs {megabytes['docs']:.2f} MB, code {megabytes['code']:.2f} MB; {sum(drops.values())} files dropped, "
            f"{duplicates['exact']} exact and {duplicates['near']} near duplicates"
        ),
    }
