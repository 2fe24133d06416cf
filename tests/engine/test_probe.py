from __future__ import annotations

import pytest

from lyceum.engine import probe as probe_module
from lyceum.engine.probe import AGAIN, TURNS, Probe


def chosen(probe: Probe[str], seconds: dict[str, float], turns: int) -> list[str]:
    ways = []
    for _ in range(turns):
        ways.append(probe.choose())
        probe.note(seconds[ways[-1]])
    return ways


@pytest.mark.parametrize(("other", "best"), [(0.5, "other"), (0.94, "other"), (0.96, "usual"), (2.0, "usual")])
def test_the_other_way_is_taken_where_it_is_faster_by_the_margin(other: float, best: str) -> None:
    probe = Probe(["usual", "other"])
    seconds = {"usual": 1.0, "other": other}
    tried = chosen(probe, seconds, 2 * TURNS)
    assert tried == ["usual", "other"] * TURNS
    assert set(chosen(probe, seconds, 100)) == {best}


def test_what_is_slow_once_does_not_decide() -> None:
    probe = Probe(["usual", "other"])
    for turn in range(2 * TURNS):
        way = probe.choose()
        probe.note(50.0 if turn in (1, 5, 9) else {"usual": 1.0, "other": 0.5}[way])  # 1: the first, with cold caches
    assert probe.choose() == "other"


def test_it_is_tried_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "AGAIN", 100)
    assert AGAIN > 100
    probe = Probe(["usual", "other"])
    assert chosen(probe, {"usual": 1.0, "other": 0.5}, 100)[-1] == "other"
    assert chosen(probe, {"usual": 0.5, "other": 1.0}, 100)[-1] == "usual"
