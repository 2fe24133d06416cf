from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lyceum.config import Recipe, build
from lyceum.corpus import pipeline
from lyceum.corpus.packages import ObjectFact
from lyceum.corpus.pipeline import CorpusConfig, capped, run, sides_of
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


# -------------------------------------------------------------------------------- sources


def lines(path: Path, count: int, text: str = "tea number {} is good") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text.format(n)}) + "\n" for n in range(count)))
    return str(path)


def test_sources_become_parts_of_their_names_without_duplicates(tmp_path: Path) -> None:
    web = lines(tmp_path / "web" / "a.jsonl", 300)
    lines(tmp_path / "web" / "b.jsonl", 20)  # the first twenty again
    books = lines(tmp_path / "books.jsonl", 4, "tea  Number {} IS good")  # and four more, equal but for case and blanks
    with open(books, "a") as file:
        file.write('{"text": "A book."}\n{"text": ""}\n')
    report = made(tmp_path / "out", sources={"web": str(Path(web).parent), "books": books}, valid_share=0.1)
    train, valid = read(tmp_path / "out", "train"), read(tmp_path / "out", "valid")
    in_web = {d.text for d in train + valid if d.meta["part"] == "web"}
    assert in_web == {f"tea number {n} is good" for n in range(300)}
    assert [d.text for d in train if d.meta["part"] == "books"] == ["A book."]
    assert report["duplicates"]["exact"] == 24 and report["drops"] == {"empty text": 1}
    counts = report["documents"]
    assert counts["train"]["web"] + counts["valid"]["web"] == 300 and 15 <= counts["valid"]["web"] <= 50
    assert not {d.id for d in train} & {d.id for d in valid}
    assert {"docs", "code"} <= set(counts["train"])  # the packages are there as ever
    size = sum(len(d.text) for d in train + valid if d.meta["part"] == "web") / 1e6
    assert f"web {size:.2f} MB, books 0.00 MB" in report["line"]


def test_more_documents_do_not_change_the_sides_of_the_first() -> None:
    documents = [Document(f"tea number {n}") for n in range(400)]
    few, many = ({d.id: side for side, d in sides_of(documents[:count], 0.2, seed=1)} for count in (200, 400))
    assert few.items() <= many.items()
    assert {d.id: side for side, d in sides_of(documents, 0.2, seed=2)} != many
    assert [d for _, d in sides_of(documents, 0.2, seed=1)] == documents


def test_a_source_of_one_book_is_held_out_at_its_end() -> None:
    book = Document("".join(f"word{n} " for n in range(2000)), meta={"part": "books"})
    (one, head), (two, tail) = sides_of([book], 0.1, seed=1)
    assert (one, two) == ("train", "valid") and head.text + tail.text == book.text
    assert head.text[-1].isalnum() and tail.text[0] == " "
    assert len(tail.text) == pytest.approx(0.1 * len(book.text), rel=0.01)
    assert head.meta == tail.meta == book.meta and head.id != tail.id
    assert list(sides_of([book], 0.0, seed=1)) == [("train", book)]


def test_a_small_source_has_something_on_each_side_if_it_can() -> None:
    assert list(sides_of([], 0.1, seed=1)) == []
    for seed in range(20):  # whatever is drawn
        assert [side for side, _ in sides_of([Document("tea")], 0.5, seed=seed)] == ["train"]
        assert {side for side, _ in sides_of([Document("tea"), Document("milk")], 0.5, seed=seed)} == {"train", "valid"}
        assert {side for side, _ in sides_of([Document("tea"), Document("milk")], 0.01, seed=seed)} == {
            "train",
            "valid",
        }


def test_of_a_source_only_so_many_megabytes_are_read(tmp_path: Path) -> None:
    path = lines(tmp_path / "web.jsonl", 1000)
    with open(path, "a") as file:
        file.write("broken")  # never reached
    report = made(tmp_path / "out", packages=[], sources={"web": path}, source_mb=0.01)
    assert sum(report["bytes"][side]["web"] for side in ("train", "valid")) == pytest.approx(10_000, abs=20)


def test_a_text_in_one_line_is_never_in_memory(tmp_path: Path) -> None:
    """24 MB in one line, whose pieces are read, compared and written one by one; as bytes and text it is 48 MB."""
    draw = random.Random(0)
    with open(tmp_path / "big.txt", "w") as file:
        for _ in range(24):
            file.write(" ".join(map(str, draw.choices(range(100_000, 1_000_000), k=150_000))) + " ")
    program = (
        "import resource, sys; from lyceum.config import Recipe; from lyceum.run import StageFolder, Work; "
        "from lyceum.corpus.pipeline import CorpusConfig, run; from pathlib import Path\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)\n"
        f"path = Path({str(tmp_path)!r})\n"
        "work = Work(StageFolder(path), {}, 1, Recipe('big', 1, {}, (), path))\n"
        "before = peak(); report = run(CorpusConfig(packages=(), sources={'big': str(path / 'big.txt')}), work)\n"
        "print(peak() - before, sum(side['big'] for side in report['bytes'].values()))"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    grown, num_bytes = map(int, said.split())
    assert num_bytes == (tmp_path / "big.txt").stat().st_size > 24e6
    assert grown < 32e6


def test_a_source_that_is_not_there_is_an_error_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "Survey", None)
    with pytest.raises(DataError, match=r"web(.|\n)*the source 'web' is not there(.|\n)*hint"):
        made(tmp_path / "out", sources={"web": str(tmp_path / "web")})
    with pytest.raises(ConfigError, match=r"'a/b' cannot be a part's name(.|\n)*hint"):
        made(tmp_path / "out", sources={"a/b": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"no source 'wed'(.|\n)*did you mean 'web'"):
        made(tmp_path / "out", sources={"web": str(tmp_path)}, columns={"wed": "text"})


def test_a_source_without_usable_text_is_an_error_that_says_what_was_left_out(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.txt").write_bytes(b"\0\1\2")
    (tmp_path / "web" / "b.txt").write_text("")
    with pytest.raises(DataError, match="'web' has no usable document; left out: 1 binary or not UTF-8, 1 empty file"):
        made(tmp_path / "out", packages=[], sources={"web": str(tmp_path / "web")})
    assert not list((tmp_path / "out").glob("documents*"))
    with pytest.raises(DataError, match="corpus is empty: .*; left out: 1 binary or not UTF-8, 1 empty file"):
        made(tmp_path / "out", packages=[], folder=str(tmp_path / "web"))


def test_code_of_a_source_passes_the_filters_of_code_and_bad_bytes_are_reported(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.py").write_text("# generated by hand-me-down\n" + "x = call(y)\n" * 50)
    (tmp_path / "mine" / "b.txt").write_bytes(b"good tea\n" * 500 + b"\xff")
    report = made(tmp_path / "out", packages=[], sources={"mine": str(tmp_path / "mine")})
    assert report["drops"] == {"marked as generated": 1} and report["replaced_characters"] == 1


def test_the_column_of_a_source_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("stars,review\n5,good tea\n1,bad tea\n")
    made(tmp_path / "out", packages=[], sources={"a": str(tmp_path / "a.csv")}, columns={"a": "review"}, valid_share=0)
    assert [d.text for d in read(tmp_path / "out", "train")] == ["good tea", "bad tea"]
