"""Jobs in the store, on either database: statuses turn as they may, and nothing is written over somebody's turn."""

from __future__ import annotations

import pytest

from lyceum.errors import NotFound
from lyceum.serve.refusals import Refusal
from lyceum.serve.store import Store
from lyceum.serve.tuning.kept import Job, Jobs

ROW = {
    "base": "demo", "name": "ft:demo", "training_file": "f", "validation_file": "", "method": {}, "metadata": {}, "seed": 1,
    "plan": {"section": "sft"},
}  # fmt: skip


@pytest.fixture
def jobs(store: Store) -> Jobs:
    return Jobs(store.database)


def add(jobs: Jobs, id: str, owner: str = "ann") -> Job:
    return jobs.add(owner, id, 3, **{**ROW, "name": f"ft:{id}"})


def test_an_owner_has_so_many_jobs_that_have_not_ended(jobs: Jobs) -> None:
    for number in range(3):
        add(jobs, str(number))
    with pytest.raises(Refusal, match="3 jobs"):
        add(jobs, "3")
    add(jobs, "b", "bob")
    jobs.cancel("ann", "0")
    add(jobs, "3")
    assert [job.id for job in jobs.listed("ann", limit=2)[0]] == ["3", "2"]
    assert [job.id for job in jobs.listed("ann", limit=9, after="2")[0]] == ["1", "0"]
    assert [job.id for job in jobs.under_way()] == ["1", "2", "b", "3"]  # the oldest first
    assert sorted(jobs.forget("ann")) == ["0", "1", "2", "3"] and [job.id for job in jobs.under_way()] == ["b"]


def test_what_was_turned_meanwhile_is_not_written_over(jobs: Jobs) -> None:
    queued = add(jobs, "a")
    assert jobs.move(queued, [{"message": "begun"}], status="running")
    running = jobs.about("ann", "a")
    jobs.cancel("ann", "a")
    saved = [{"name": "ft:a", "folder": "sft/checkpoint", "step": 1, "metrics": {}}]
    assert not jobs.move(running, [{"message": "done"}], saved, status="succeeded")
    assert jobs.status("a") == "cancelled" and jobs.models() == []
    said = [event.message for event in jobs.news("ann", "a", 1)[1]]
    assert said == ["begun", "Fine-tuning job cancelled"]


def test_models_are_those_of_jobs_that_succeeded_each_saved_once(jobs: Jobs) -> None:
    job = add(jobs, "a")
    jobs.move(job, status="running")
    saved = {"name": "ft:a:ckpt-step-1", "folder": "sft/snapshot-0.50", "step": 1, "metrics": {"train_loss": 0.5}}
    for _ in range(2):
        assert jobs.move(jobs.about("ann", "a"), [], [saved])
    assert jobs.models() == [] and len(jobs.checkpoints("ann", "a", limit=9)[0]) == 1
    jobs.move(jobs.about("ann", "a"), [], [{**saved, "name": "ft:a", "step": 2}], status="succeeded")
    assert [(owner, one.name) for owner, one in jobs.models()] == [("ann", "ft:a:ckpt-step-1"), ("ann", "ft:a")]
    jobs.drop_model("ft:a")
    assert [one.name for _, one in jobs.models()] == ["ft:a:ckpt-step-1"]
    with pytest.raises(NotFound):
        jobs.checkpoints("bob", "a", limit=9)
