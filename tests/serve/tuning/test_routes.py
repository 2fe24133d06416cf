"""Jobs over the wire, by the official client, with processes that a test makes up: states, events, checkpoints, owners."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import openai
import pytest

from lyceum.config import load_recipe
from lyceum.log import Metrics
from lyceum.run import PARTIAL, write_json
from lyceum.serve.keys import Key, hash_of
from lyceum.serve.limits import SCOPES, Limits
from lyceum.serve.porter import Porter
from tests.serve.tuning.conftest import Pretend

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the reply"}]}
PAIR = {
    "input": {"messages": [{"role": "user", "content": "hi"}]},
    "preferred_output": [{"role": "assistant", "content": "the reply"}],
    "non_preferred_output": [{"role": "assistant", "content": "the question"}],
}
TASK = {"messages": [{"role": "user", "content": "hi"}], "answer": "the reply"}
CHECK = {
    "type": "string_check", "name": "same", "operation": "eq",
    "input": "{{ sample.output_text }}", "reference": "{{ item.answer }}",
}  # fmt: skip


def upload(client: openai.OpenAI, rows: Iterable[Any], purpose: Any = "fine-tune") -> str:
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    return client.files.create(file=("rows.jsonl", lines), purpose=purpose).id


def until(client: openai.OpenAI, id: str, *statuses: str, within_s: float = 10.0) -> Any:
    end = time.monotonic() + within_s
    while (job := client.fine_tuning.jobs.retrieve(id)).status not in statuses:
        assert time.monotonic() < end, job
        time.sleep(0.02)
    return job


def finish(home: Path, id: str, base: Path, pretend: Pretend, section: str = "sft") -> None:
    """What a process that came to its end leaves."""
    folder = home / "jobs" / id / section
    metrics = Metrics(folder / "metrics.jsonl")
    metrics.write(1, {"loss": 2.0, "token_accuracy": 0.25, "tokens": 10})
    metrics.write(10, {"loss": 0.5, "token_accuracy": 0.75, "valid/loss": 0.75, "valid/accuracy": 0.5, "tokens": 100})
    for name in ("snapshot-0.50", "checkpoint"):
        partial = folder / f"{name}{PARTIAL}"  # whole or not at all, as real ones are
        shutil.copytree(base, partial)
        write_json(partial / "lyceum.json", {"step": 5 if name == "snapshot-0.50" else 10})
        partial.rename(folder / name)
    (folder / "trainer").mkdir()
    pretend.finished.add(id)
    pretend.alive.discard(id)


def test_a_job_from_its_files_to_a_model_that_answers(tuning: Callable, pretend: Pretend, base: Path) -> None:
    server = tuning()
    client = server.openai()
    train, valid = upload(client, [CHAT] * 12), upload(client, [CHAT] * 3)
    job = client.fine_tuning.jobs.create(
        model="demo", training_file=train, validation_file=valid, suffix="pirate", seed=7, metadata={"a": "b"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "learning_rate_multiplier": 0.5}}},
    )  # fmt: skip
    assert (job.object, job.model, job.training_file, job.validation_file) == ("fine_tuning.job", "demo", train, valid)
    assert (job.seed, job.metadata, job.fine_tuned_model, job.result_files) == (7, {"a": "b"}, None, [])
    assert job.hyperparameters.n_epochs == 2 and job.hyperparameters.batch_size == 4
    assert job.method is not None and job.method.supervised is not None
    recipe = load_recipe(server.home / "jobs" / job.id / "job.toml")
    assert recipe.seed == 7 and recipe.name == job.id
    (section,) = recipe.sections
    assert section.kind == "sft" and section.source == str(base.resolve()) and section.settings["epochs"] == 2.0
    assert section.settings["lr"] == pytest.approx(0.5 * 2e-3) and section.settings["snapshots"] == [0.5]
    until(client, job.id, "running")

    finish(server.home, job.id, base, pretend)
    job = until(client, job.id, "succeeded")
    name = f"ft:demo:lyceum:pirate:{job.id[-8:]}"
    assert job.fine_tuned_model == name and job.trained_tokens == 100 and job.error is None and job.finished_at
    saved = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert [(one.step_number, one.fine_tuned_model_checkpoint) for one in saved] == [
        (10, name), (5, f"{name}:ckpt-step-5"),
    ]  # fmt: skip
    assert saved[0].metrics.train_loss == 0.5 and saved[0].metrics.full_valid_loss == 0.75
    assert saved[1].metrics.train_loss == 2.0 and saved[1].metrics.valid_loss is None
    events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
    assert [event.message for event in reversed(events) if event.type == "message"] == [
        f"Created fine-tuning job: {job.id}", "Fine-tuning job started", f"New fine-tuned model created: {name}",
        "The job has successfully completed",
    ]  # fmt: skip
    metrics = [event.data for event in reversed(events) if event.type == "metrics"]
    assert metrics == [
        {"step": 1, "train_loss": 2.0, "train_mean_token_accuracy": 0.25},
        {"step": 10, "train_loss": 0.5, "train_mean_token_accuracy": 0.75, "valid_loss": 0.75, "valid_mean_token_accuracy": 0.5},
    ]  # fmt: skip
    table = client.files.content(job.result_files[0]).text.splitlines()
    assert table[0].startswith("step,train_loss,train_mean_token_accuracy,valid_loss") and table[2].startswith(
        "10,0.5,0.75,0.75"
    )
    assert not (server.home / "jobs" / job.id / "sft" / "trainer").exists()

    shown = [model.id for model in client.models.list()]
    assert shown == ["demo", f"{name}:ckpt-step-5", name]
    for model in shown:
        said = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "hi"}], max_tokens=3)
        assert said.model == model
    assert client.models.retrieve(name).id == name
    server.close()
    again = tuning()  # after a restart it is there
    client = again.openai()
    assert [model.id for model in client.models.list()] == shown
    said = client.chat.completions.create(model=name, messages=[{"role": "user", "content": "hi"}], max_tokens=3)
    assert said.model == name
    assert client.models.delete(name).deleted and [model.id for model in client.models.list()] == shown[:2]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=name, messages=[{"role": "user", "content": "hi"}])


def test_the_other_methods_become_sections_of_their_own(tuning: Callable, pretend: Pretend) -> None:
    server = tuning()
    client = server.openai()
    pairs, tasks = upload(client, [PAIR] * 8), upload(client, [TASK] * 4)
    dpo = client.fine_tuning.jobs.create(
        model="demo", training_file=pairs, method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}}
    )
    multi = {
        "type": "multi", "name": "both", "calculate_output": "0.5 * same + 0.5 * judged",
        "graders": {
            "same": CHECK,
            "judged": {
                "type": "score_model", "name": "j", "model": "demo",
                "input": [{"role": "user", "content": "{{ sample.output_text }}"}],
            },
        },
    }  # fmt: skip
    method: Any = {"type": "reinforcement", "reinforcement": {"grader": multi}}
    drawn = client.fine_tuning.jobs.create(model="demo", training_file=tasks, method=method)
    kinds = [load_recipe(server.home / "jobs" / job.id / "job.toml").sections[0] for job in (dpo, drawn)]
    assert [section.kind for section in kinds] == ["preference", "grpo"]
    assert kinds[0].settings["beta"] == 0.2 and kinds[1].settings["rewards"] == {"grader": 1.0}
    row = json.loads((server.home / "jobs" / drawn.id / "data" / "train.jsonl").read_text().splitlines()[0])
    assert row["meta"]["item"] == {"answer": "the reply"} and row["meta"]["grader"]["graders"]["judged"]["folder"]
    told = server.ask("GET", f"/v1/fine_tuning/jobs/{drawn.id}").json["method"]["reinforcement"]
    assert told["grader"] == multi and told["hyperparameters"]["compute_multiplier"] == 1.0


def test_what_cannot_begin_is_refused_at_once(tuning: Callable, pretend: Pretend) -> None:
    server = tuning(limits=Limits(jobs=2))
    client = server.openai()
    train, pairs, other = upload(client, [CHAT]), upload(client, [PAIR]), upload(client, [{}], "user_data")
    long = upload(client, [{"messages": [{"role": "user", "content": "hi " * 200}, CHAT["messages"][1]]}])
    reinforced: Any = {"type": "reinforcement", "reinforcement": {"grader": CHECK}}

    def grade(**grader: Any) -> Any:
        return {"method": {"type": "reinforcement", "reinforcement": {"grader": {"name": "g", **grader}}}}

    given: list[tuple[dict[str, Any], str, str]] = [
        ({"training_file": "file-none"}, "training_file", "no file"),
        ({"training_file": other}, "training_file", "purpose"),
        ({"training_file": pairs}, "training_file", "holds dpo"),
        ({"method": reinforced}, "training_file", "holds supervised"),
        ({"training_file": long}, "training_file", "None of the 1 examples fits"),
        ({"validation_file": pairs}, "validation_file", "holds dpo"),
        ({"method": reinforced, "validation_file": train}, "validation_file", "not supported"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations", "not supported"),
        ({"suffix": "a:b"}, "suffix", "suffix"),
        ({"suffix": "a" * 65}, "suffix", "suffix"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", ""),
        ({"hyperparameters": {"n_epochs": "some"}}, "hyperparameters.n_epochs", ""),
        ({"method": {"type": "reinforcement"}}, "method.reinforcement.grader", "Missing"),
        (grade(type="python", source="x"), "method.reinforcement.grader", "sandbox"),
        (grade(type="label_model"), "method.reinforcement.grader", "not supported"),
        (grade(**{**CHECK, "reference": "{{ os.environ }}"}), "method.reinforcement.grader.reference", "not known"),
        (grade(**{**CHECK, "operation": "is"}), "method.reinforcement.grader", "operation"),
        (grade(type="multi", graders={"a": CHECK}, calculate_output="b"), "", "no formula"),
        (grade(type="score_model", model="none", input=[{"role": "user", "content": "x"}]), "", "holds"),
    ]  # fmt: skip
    for change, param, said in given:
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as found:
            client.fine_tuning.jobs.create(**{"model": "demo", "training_file": train, **change})
        assert param in (found.value.param or "") or not param, found.value.message
        assert said in found.value.message or "does not exist" in found.value.message, found.value.message
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.create(model="none", training_file=train)
    assert client.fine_tuning.jobs.list().data == [] and list((server.home / "jobs").glob("ftjob*")) == []
    for _ in range(2):
        client.fine_tuning.jobs.create(model="demo", training_file=train)
    with pytest.raises(openai.RateLimitError, match="of 2"):
        client.fine_tuning.jobs.create(model="demo", training_file=train)


def test_jobs_wait_for_each_other_pause_go_on_and_end(tuning: Callable, pretend: Pretend) -> None:
    server = tuning()
    client = server.openai()
    jobs = client.fine_tuning.jobs
    train = upload(client, [CHAT] * 4)
    first, second, third = (jobs.create(model="demo", training_file=train).id for _ in range(3))
    until(client, first, "running")
    assert jobs.retrieve(second).status == jobs.retrieve(third).status == "queued"
    assert [job.id for job in jobs.list(limit=2)] == [third, second, first]  # all pages
    assert jobs.cancel(second).status == "cancelled"
    assert jobs.pause(first).status == "paused"
    until(client, third, "running")
    assert pretend.alive == {third}
    assert jobs.resume(first).status == "queued"
    for wrong in (jobs.cancel, jobs.pause, jobs.resume):
        with pytest.raises(openai.BadRequestError, match="The job is cancelled"):
            wrong(second)
    with pytest.raises(openai.BadRequestError, match="only one that is paused"):
        jobs.resume(third)
    assert jobs.cancel(third).status == "cancelled"
    until(client, first, "running")
    assert pretend.started == [first, third, first]
    end = time.monotonic() + 5
    while (server.home / "jobs" / second / "data").exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert not (server.home / "jobs" / second / "data").exists()


def test_a_killed_process_goes_on_and_three_without_progress_fail(tuning: Callable, pretend: Pretend) -> None:
    server = tuning()
    client = server.openai()
    id = client.fine_tuning.jobs.create(model="demo", training_file=upload(client, [CHAT] * 4)).id
    until(client, id, "running")
    metrics = Metrics(server.home / "jobs" / id / "sft" / "metrics.jsonl")
    for number in range(1, 5):  # with progress it may be killed any number of times
        metrics.write(number, {"loss": 1.0, "tokens": number})
        pretend.alive.discard(id)
        end = time.monotonic() + 5
        while len(pretend.started) <= number and time.monotonic() < end:
            time.sleep(0.01)
        assert len(pretend.started) == number + 1 and client.fine_tuning.jobs.retrieve(id).status == "running"
    end = time.monotonic() + 10
    while client.fine_tuning.jobs.retrieve(id).status == "running" and time.monotonic() < end:
        pretend.alive.discard(id)
        time.sleep(0.02)
    job = client.fine_tuning.jobs.retrieve(id)
    assert job.status == "failed" and job.error is not None and job.error.code == "process_killed"
    assert len(pretend.started) == 7  # four were killed with progress, and three without
    assert "killed 3 times" in job.error.message and job.fine_tuned_model is None
    steps = [
        event.data["step"] for event in client.fine_tuning.jobs.list_events(id, limit=100) if event.type == "metrics"
    ]  # type: ignore[index]
    assert steps == [4, 3, 2, 1]  # none twice


def test_a_job_that_says_why_it_failed_is_not_tried_again(tuning: Callable, pretend: Pretend) -> None:
    server = tuning()
    client = server.openai()
    id = client.fine_tuning.jobs.create(model="demo", training_file=upload(client, [CHAT] * 4)).id
    until(client, id, "running")
    pretend.errors[id] = f"{server.home}/jobs/{id}/data/train.jsonl line 3: no such thing\nhint: another"
    pretend.alive.discard(id)
    job = until(client, id, "failed")
    assert job.error is not None and job.error.message == "data/train.jsonl line 3: no such thing\nhint: another"
    assert pretend.started == [id]
    assert client.fine_tuning.jobs.list_events(id).data[0].level == "error"


def test_a_restarted_server_finds_its_jobs(tuning: Callable, pretend: Pretend, base: Path) -> None:
    server = tuning()
    client = server.openai()
    train = upload(client, [CHAT] * 4)
    first, second = (client.fine_tuning.jobs.create(model="demo", training_file=train).id for _ in range(2))
    until(client, first, "running")
    server.close()  # in order: its process ends, the job waits
    assert not pretend.alive
    server = tuning()
    client = server.openai()
    until(client, first, "running")
    assert pretend.started == [first, first]
    finish(server.home, first, base, pretend)
    until(client, first, "succeeded")
    until(client, second, "running")


def test_folders_of_jobs_that_another_store_knows_are_left_alone(tuning: Callable, pretend: Pretend) -> None:
    server = tuning()
    client = server.openai()
    mine = client.fine_tuning.jobs.create(model="demo", training_file=upload(client, [CHAT] * 4)).id
    until(client, mine, "running")
    server.close()
    other = server.home / "jobs" / "ftjob-of-another-store"
    (other / "sft" / "checkpoint").mkdir(parents=True)
    (other / pretend.LOCK).touch()
    server = tuning()
    until(server.openai(), mine, "running")
    server.close()
    assert (other / "sft" / "checkpoint").is_dir()


def test_events_are_followed_as_they_happen(
    tuning: Callable, pretend: Pretend, base: Path, read_events: Callable
) -> None:
    server = tuning()
    client = server.openai()
    id = client.fine_tuning.jobs.create(model="demo", training_file=upload(client, [CHAT] * 4)).id
    until(client, id, "running")
    threading.Timer(0.7, finish, (server.home, id, base, pretend)).start()
    answer = server.ask("GET", f"/v1/fine_tuning/jobs/{id}/events?stream=true")
    found = read_events(answer.text)
    assert found[-1] == "[DONE]" and found[-2]["message"] == "The job has successfully completed"
    assert [event["message"][:7] for event in found[:2]] == ["Created", "Fine-tu"]
    assert sum(event["type"] == "metrics" for event in found[:-1]) == 2


def test_nobodys_job_file_or_model_is_visible_to_another(tuning: Callable, pretend: Pretend, base: Path) -> None:
    server = tuning(porter=Porter(lambda: [Key(n, n, n, hash_of(n[0] * 40), SCOPES) for n in ("alice", "bob")]))
    alice, bob = server.openai("a" * 40), server.openai("b" * 40)
    train = upload(alice, [CHAT] * 4)
    with pytest.raises(openai.BadRequestError, match="There is no file"):
        bob.fine_tuning.jobs.create(model="demo", training_file=train)
    id = alice.fine_tuning.jobs.create(model="demo", training_file=train).id
    until(alice, id, "running")
    finish(server.home, id, base, pretend)
    name = until(alice, id, "succeeded").fine_tuned_model
    theirs = bob.fine_tuning.jobs
    for ask in (
        theirs.retrieve,
        theirs.cancel,
        theirs.pause,
        theirs.resume,
        theirs.list_events,
        theirs.checkpoints.list,
    ):
        with pytest.raises(openai.NotFoundError):
            ask(id)
    assert (
        server.ask(
            "GET", f"/v1/fine_tuning/jobs/{id}/events?stream=true", headers={"authorization": "Bearer " + "b" * 40}
        ).status
        == 404
    )
    assert theirs.list().data == [] and [model.id for model in bob.models.list()] == ["demo"]
    for ask in (bob.models.retrieve, bob.models.delete):
        with pytest.raises(openai.NotFoundError):
            ask(name)
    hi: Any = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.NotFoundError) as hidden:
        bob.chat.completions.create(model=name, messages=hi)
    assert name not in hidden.value.message.replace(f"The model {name!r}", "")  # no hint either
    with pytest.raises(openai.NotFoundError):
        bob.completions.create(model=name, prompt="hi")
    with pytest.raises(openai.NotFoundError):
        bob.fine_tuning.jobs.create(model=name, training_file=upload(bob, [CHAT]))
    bearer = {"authorization": "Bearer " + "b" * 40}
    assert server.post("/tokenize", {"model": name, "prompt": "hi"}, **bearer).status == 404
    assert server.ask("GET", "/api/start", headers=bearer).json["models"][-1]["id"] == "demo"
    mine = server.ask("GET", "/api/start", headers={"authorization": "Bearer " + "a" * 40}).json["models"]
    assert mine[-1]["id"] == name
    assert server.ask("DELETE", "/api/account", headers={"authorization": "Bearer " + "a" * 40}).status == 200
    assert alice.fine_tuning.jobs.list().data == [] and [m.id for m in alice.models.list()] == ["demo"]
    assert alice.files.list().data == []


def test_training_is_a_scope_of_its_own(tuning: Callable, pretend: Pretend) -> None:
    server = tuning(porter=Porter(lambda: [Key("k", "k", "k", hash_of("k" * 40), ("models", "inference"))]))
    client = server.openai("k" * 40)
    train = upload(client, [CHAT])
    with pytest.raises(openai.PermissionDeniedError, match="training"):
        client.fine_tuning.jobs.create(model="demo", training_file=train)
