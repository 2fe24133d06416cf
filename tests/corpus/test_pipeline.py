from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lyceum.config import Recipe, build
from lyceum.corpus.packages import ObjectFact
from lyceum.corpus.pipeline import CorpusConfig, capped, run
from lyceum.corpus.records import Document, read_documents
from lyceum.errors import ConfigError, DataError
from lyceum.run import StageFolder, Work


def work(path: Path, seed: int = 1) -> Work:
    path.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(name="test", seed=seed, model={}, sections=(), path=path)
    return Work(StageFolder(path), {}, seed, recipe)


def made(path: Path, seed: int = 1, **settings: Any) -> dict[str, Any]:
    config = build(CorpusConfig, {"packages": ["json", "textwrap"], "objects": 12, **settings}, "[corpus]")
    return run(config, work(path, seed))


def read(path: Path, side: str) -> list[Document]:
    return list(read_documents(path / f"documents-{side}.jsonl"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("corpus")
    return path, made(path, docs_valid_share=0.5, valid_share=0.2)


def test_the_files_hold_what_the_report_says(corpus: tuple[Path, dict[str, Any]]) -> None:
    path, report = corpus
    for side in ("train", "valid"):
        for part in ("docs", "code"):
            documents = [d for d in read(path, side) if d.meta["part"] == part]
            assert len(documents) == report["documents"][side][part] > 0
            assert sum(len(d.text.encode()) for d in documents) == report["bytes"][side][part]
    assert report["objects"] == len((path / "objects.jsonl").read_text().splitlines()) == 12
    assert json.loads(json.dumps(report)) == report
    assert "12 objects of json, textwrap" in report["line"]


def test_no_document_is_on_both_sides_and_every_fact_is_in_training(corpus: tuple[Path, dict[str, Any]]) -> None:
    path, _ = corpus
    train, valid = read(path, "train"), read(path, "valid")
    assert not {d.id for d in train} & {d.id for d in valid}
    held_out = [d.meta["object"] for d in valid if "object" in d.meta]
    assert len(held_out) == len(set(held_out)) == 6  # one layout of half the twelve objects
    objects = [ObjectFact.from_json(json.loads(line)) for line in (path / "objects.jsonl").read_text().splitlines()]
    for fact in objects:
        layouts = {d.meta["layout"] for d in train if d.meta.get("object") == fact.name}
        assert len(layouts) == 6 - held_out.count(fact.name)


def test_unstudied_names_are_real_and_nothing_studied_is_among_them(corpus: tuple[Path, dict[str, Any]]) -> None:
    path, report = corpus
    names = json.loads((path / "names.json").read_text())
    studied = {json.loads(line)["name"] for line in (path / "objects.jsonl").read_text().splitlines()}
    assert len(names["unstudied"]) == report["names_unstudied"]
    assert not studied & set(names["unstudied"])
    assert "json" not in names["unstudied"]  # a module with something studied inside
    assert "textwrap.TextWrapper.fix_sentence_endings" not in names["unstudied"]  # no name of a function
    assert "json.JSONEncoder.iterencode" in studied | set(names["unstudied"])


def test_others_are_unstudied_facts_with_a_short_sentence(corpus: tuple[Path, dict[str, Any]]) -> None:
    path, _ = corpus
    others = [ObjectFact.from_json(json.loads(line)) for line in (path / "others.jsonl").read_text().splitlines()]
    studied = {json.loads(line)["name"] for line in (path / "objects.jsonl").read_text().splitlines()}
    assert others and not studied & {fact.name for fact in others}
    assert all(0 < len(fact.summary.split()) <= 25 for fact in others)
    assert {fact.name for fact in others} <= {
        *json.loads((path / "names.json").read_text())["unstudied"],
        "json",
        "textwrap",
    }


def test_the_same_seed_gives_the_same_files_and_another_seed_another_split(
    corpus: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path, _ = corpus
    made(tmp_path / "same", docs_valid_share=0.5, valid_share=0.2)
    made(tmp_path / "other", seed=2, docs_valid_share=0.5, valid_share=0.2)
    for name in ("documents-train.jsonl", "documents-valid.jsonl", "objects.jsonl", "names.json"):
        assert (tmp_path / "same" / name).read_bytes() == (path / name).read_bytes()
    assert {d.id for d in read(tmp_path / "other", "valid")} != {d.id for d in read(path, "valid")}
    assert (tmp_path / "other" / "objects.jsonl").read_bytes() == (path / "objects.jsonl").read_bytes()


def test_steps_account_for_every_document(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    code = "def sell(item, price):\n    return price - item.cost  # {}\n" * 30
    words = [f"line{n} = {n} * sell(item{n}, price)" for n in range(60)]
    (folder / "a.py").write_text(code)
    (folder / "b.py").write_text(code.replace("    return", "      return"))  # equal but for white space
    (folder / "c.py").write_text("\n".join(words))
    (folder / "d.py").write_text("\n".join([*words[:59], "one_more = 1"]))  # near
    (folder / "e.py").write_text("# generated by hand-me-down\n" + code)
    (folder / "f.md").write_text("# A guide\n\nSell things.\n")
    (folder / "g.txt").write_bytes(b"\0\1\2")
    report = made(tmp_path / "out", packages=[], folder=str(folder), valid_share=0)
    assert report["documents"] == {"train": {"docs": 1, "code": 2}, "valid": {}}
    assert report["drops"] == {"binary or not UTF-8": 1, "marked as generated": 1}
    assert (report["duplicates"]["exact"], report["duplicates"]["near"]) == (1, 1)
    assert [(r["removed"], r["for"]) for r in report["duplicates"]["removed"]] == [("b.py", "a.py"), ("d.py", "c.py")]
    for step in report["steps"]:
        assert step["out"] <= step["in"] or step["step"] in ("survey",)
    without = made(tmp_path / "off", packages=[], folder=str(folder), valid_share=0, near_duplicates=0)
    assert without["documents"]["train"]["code"] == 3


def test_the_cap_bounds_the_code_and_depends_on_the_seed_only() -> None:
    documents = [Document(f"{n}" * 100) for n in range(10)]
    kept = capped(documents, 350, seed=1)
    assert len(kept) == 3 and kept == capped(documents, 350, seed=1)
    assert [d.text for d in kept] == sorted(d.text for d in kept)
    assert any(capped(documents, 350, seed=seed) != kept for seed in range(2, 6))


def test_no_code_is_read_with_a_cap_of_zero(tmp_path: Path) -> None:
    assert made(tmp_path, code_mb=0)["documents"]["train"] == {"docs": 70}  # 12 objects, 6 layouts, 2 held out


def test_an_empty_corpus_is_an_error_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty") as caught:
        made(tmp_path / "out", packages=[], folder=str(tmp_path / "empty"))
    assert "folder" in caught.value.hint


def test_settings_out_of_bounds_are_errors() -> None:
    with pytest.raises(ConfigError):
        build(CorpusConfig, {"objects": 0}, "[corpus]")
    with pytest.raises(ConfigError):
        build(CorpusConfig, {"object": 10}, "[corpus]")
