"""The runs page's routes: what is listed, what comes of a growing run, what differs, and who may look."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nh3", reason="needs the extra lyceum[serve]")

from lyceum.serve.keys import Key, hash_of
from lyceum.serve.limits import SCOPES
from lyceum.serve.porter import Porter

Make = Callable[..., Any]
RECIPE = 'name = "{name}"\nseed = {seed}\n\n[model]\ndepth = 4\n\n[sft]\nlr = {lr}\n'


def make_run(folder: Path, *, lr: float = 0.5, num_lines: int = 3, finished: bool = True) -> Path:
    (folder / "sft").mkdir(parents=True)
    (folder / "recipe.toml").write_text(RECIPE.format(name=folder.name, seed=0, lr=lr))
    state = {"key": "k", "kind": "sft", "settings": {}, "inputs": {}, "finished": finished, "wall_s": 61.0}
    (folder / "sft" / "state.json").write_text(json.dumps(state))
    lines = [json.dumps({"step": 10 * n, "loss": lr / n, "loss/reply": lr / n}) for n in range(1, num_lines + 1)]
    (folder / "sft" / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    samples = [{"step": 10, "prompt": "2 + 2?", "reply": "<b>4</b>"}]
    (folder / "sft" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    (folder / "sft" / "report.json").write_text(
        json.dumps({"line": "loss 0.1", "loss": float("nan"), "long": "x" * 9000})
    )
    return folder


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    make_run(tmp_path / "runs" / "demo")
    make_run(tmp_path / "runs" / "other", lr=0.25, num_lines=2, finished=False)
    make_run(tmp_path / "secret")
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "runs" / "notes").mkdir()
    return tmp_path / "runs"


def get(server: Any, path: str, key: str = "") -> Any:
    return server.ask("GET", path, headers={"authorization": f"Bearer {key}"} if key else None)


def test_the_list_and_one_run(page: Make, shelf: Path) -> None:
    server = page(shelf=shelf)
    told = get(server, "/api/runs").json
    assert told["folder"] == "runs" and {run["name"]: run["state"] for run in told["runs"]} == {
        "demo": "finished",
        "other": "running",  # its clock is fresh
    }
    demo = next(run for run in told["runs"] if run["name"] == "demo")
    assert demo["now"] == {"section": "sft", "step": 30, "loss": pytest.approx(0.5 / 3)} and demo["finished"] == 1
    one = get(server, "/api/runs/demo").json
    (section,) = one["sections"]
    assert section["final"]["step"] == 30 and section["curves"][0] == "loss/reply" and one["settings"]["sft.lr"] == 0.5
    assert section["report"] == {"line": "loss 0.1", "loss": None, "long": "..."}  # what is too long is in report.html


def test_what_has_come_since_is_read_from_where_it_was_left_off(page: Make, shelf: Path) -> None:
    server, path = page(shelf=shelf), "/api/runs/other/sections/sft/metrics"
    first = get(server, path).json
    assert [row["step"] for row in first["rows"]] == [10, 20] and first["last"] and not first["anew"]
    assert get(server, f"{path}?start={first['end']}").json["rows"] == []
    with open(shelf / "other" / "sft" / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "loss": NaN}\n{"step": 4')
    news = get(server, f"{path}?start={first['end']}").json
    assert news["rows"] == [{"step": 30, "loss": None}]
    (shelf / "other" / "sft" / "metrics.jsonl").write_text('{"step": 10}\n')
    again = get(server, f"{path}?start={news['end']}").json
    assert again["anew"] and again["rows"] == [{"step": 10}]
    samples = get(server, "/api/runs/other/sections/sft/samples").json
    assert samples["rows"] == [{"step": 10, "prompt": "2 + 2?", "reply": "<b>4</b>"}]


def test_two_runs_beside_each_other(page: Make, shelf: Path) -> None:
    told = get(page(shelf=shelf), "/api/runs/demo/beside/other").json
    assert told["runs"] == ["demo", "other"] and told["settings"] == {"sft.lr": [0.5, 0.25]}
    assert told["final"]["sft"]["step"] == [30, 20]


@pytest.mark.parametrize(
    "path",
    [
        "/api/runs/none", "/api/runs/..", "/api/runs/%2e%2e", "/api/runs/link", "/api/runs/notes", "/api/runs/demo%2fsft",
        "/api/runs/demo/sections/..%2f..%2fsecret/metrics", "/api/runs/demo/sections/../metrics",
        "/api/runs/demo/sections/sft/report.json", "/api/runs/demo/sections/sft/recipe", "/api/runs/demo/beside/link",
    ],
)  # fmt: skip
def test_nothing_else_is_given(path: str, page: Make, shelf: Path) -> None:
    found = get(page(shelf=shelf), path)
    assert found.status == 404, found.text


def test_a_key_needs_the_scope_and_a_server_without_a_folder_says_so(page: Make, shelf: Path) -> None:
    people = {"a": ("models", "inference"), "b": SCOPES}
    keys = [Key(name, name, name, hash_of(name * 40), scopes) for name, scopes in people.items()]
    server = page(shelf=shelf, porter=Porter(lambda: keys))
    for path in ("/api/runs", "/api/runs/demo", "/api/runs/demo/sections/sft/metrics", "/api/runs/demo/beside/other"):
        assert get(server, path).status == 401
        refused = get(server, path, "a" * 40)
        assert refused.status == 403 and refused.json["error"]["code"] == "missing_scope"
        assert get(server, path, "b" * 40).status == 200
    none = get(page(), "/api/runs")
    assert none.status == 404 and "--runs" in none.json["error"]["message"]
