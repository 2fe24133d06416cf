"""The routes of fine-tuning, in OpenAI's shapes.

| route | what it does |
|---|---|
| POST, GET /v1/fine_tuning/jobs | ask for a job; the caller's jobs, newest first |
| GET /v1/fine_tuning/jobs/{id} | one |
| POST /v1/fine_tuning/jobs/{id}/cancel, /pause, /resume | end it; let it wait; let it go on |
| GET /v1/fine_tuning/jobs/{id}/events | what happened, newest first; `stream=true`: from the beginning, as it happens |
| GET /v1/fine_tuning/jobs/{id}/checkpoints | models that it saved, with what was measured then |
| DELETE /v1/models/{id} | a model that a job of the caller's has made |

What is wrong with a job's files or its method is said at once, with 400, and nothing is queued: a job that is queued can begin.
Another's job, file or model is not there.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from lyceum.errors import NotFound
from lyceum.run import disk_errors
from lyceum.serve.app import EventStream, post, private, read
from lyceum.serve.files.checks import Found
from lyceum.serve.files.kept import File, Files
from lyceum.serve.guard import caller_of
from lyceum.serve.limits import Caller
from lyceum.serve.listing import as_list, check_page
from lyceum.serve.models import Served
from lyceum.serve.refusals import Refusal
from lyceum.serve.service import Service
from lyceum.serve.tuning.foreman import Foreman
from lyceum.serve.tuning.kept import ENDED, Job, Jobs
from lyceum.serve.tuning.recipes import TRAIN, VALID, plan_of, write_examples, write_recipe
from lyceum.serve.tuning.wishes import JobRequest, judges_of

ORGANISATION = "lyceum"
PAGE = 20
MAX_PAGE = 100
LOOK_EVERY_S = 0.5  # for events that a client follows
SHORT = 8  # characters of a job's id in the name of its model


def tuning_routes(service: Service, files: Files, jobs: Jobs, foreman: Foreman) -> APIRouter:
    """The routes; the foreman works as long as the application lives."""
    desk = Desk(service, files, jobs, foreman)

    @asynccontextmanager
    async def life(app: Any) -> AsyncIterator[None]:
        foreman.start()
        yield
        await asyncio.to_thread(foreman.close)

    router = APIRouter(lifespan=life, default_response_class=Response)
    base = "/v1/fine_tuning/jobs"

    @post(router, base, JobRequest)
    async def create(request: Request) -> Response:
        """Ask for a fine-tuning job. What would keep it from beginning is refused at once."""
        wish = await read(request, JobRequest, service)
        return private(job_json(await desk.create(wish, caller_of(request))))

    @router.get(base)
    async def listed(request: Request, limit: str = str(PAGE), after: str = "") -> Response:
        """Your jobs, newest first (`limit`, `after`)."""
        check_page("desc", limit, MAX_PAGE)
        if any(name.startswith("metadata") for name in request.query_params):
            raise Refusal(400, "'metadata' does not choose jobs here.", param="metadata", code="unsupported_parameter")
        given: dict[str, Any] = {"limit": int(limit), "after": after or None}
        page, has_more = await asyncio.to_thread(jobs.listed, caller_of(request).id, **given)
        return private(as_list([job_json(job) for job in page], has_more))

    @router.get(base + "/{id}")
    async def retrieve(request: Request, id: str) -> Response:
        """A job as it stands."""
        return private(job_json(await asyncio.to_thread(jobs.about, caller_of(request).id, id)))

    turns = {"cancel": jobs.cancel, "pause": jobs.pause, "resume": jobs.resume}

    @router.post(base + "/{id}/{verb}")
    async def turn(request: Request, id: str, verb: str) -> Response:
        """`cancel`, `pause` or `resume` a job."""
        if verb not in turns:
            raise Refusal(404, f"Invalid URL (POST {request.url.path})", code="unknown_url")
        job = await asyncio.to_thread(turns[verb], caller_of(request).id, id)
        foreman.wake(id)
        return private(job_json(job))

    @router.get(base + "/{id}/events")
    async def events(
        request: Request, id: str, limit: str = str(PAGE), after: str = "", stream: bool = False
    ) -> Response:
        """What happened to a job, newest first; `stream=true`: from the beginning, as it happens."""
        owner = caller_of(request).id
        if stream:
            await asyncio.to_thread(jobs.about, owner, id)
            return EventStream(Following(jobs, owner, id))
        check_page("desc", limit, MAX_PAGE)
        given: dict[str, Any] = {"limit": int(limit), "after": after or None}
        page, has_more = await asyncio.to_thread(jobs.events, owner, id, **given)
        return private(as_list([event.to_json() for event in page], has_more))

    @router.get(base + "/{id}/checkpoints")
    async def checkpoints(request: Request, id: str, limit: str = "10", after: str = "") -> Response:
        """The models that a job saved, with what was measured then."""
        check_page("desc", limit, MAX_PAGE)
        given: dict[str, Any] = {"limit": int(limit), "after": after or None}
        page, has_more = await asyncio.to_thread(jobs.checkpoints, caller_of(request).id, id, **given)
        return private(as_list([checkpoint.to_json() for checkpoint in page], has_more))

    @router.delete("/v1/models/{model:path}")
    async def delete(request: Request, model: str) -> Response:
        """Delete a model that a job of yours has made."""
        caller = caller_of(request)
        caller.need("training")
        await asyncio.to_thread(desk.delete_model, model, caller)
        return private({"id": model, "object": "model", "deleted": True})

    return router


class Desk:
    """What the routes do."""

    def __init__(self, service: Service, files: Files, jobs: Jobs, foreman: Foreman):
        self.service, self.files, self.jobs, self.foreman = service, files, jobs, foreman
        self._making = asyncio.Semaphore(1)  # as with files: one long reading at a time

    async def create(self, wish: JobRequest, caller: Caller) -> Job:
        """Queue a job. Raises Refusal for whatever would keep it from beginning."""
        served = await self.service.find(wish.model, caller)
        if served.chat is None or served.folder is None:
            raise Refusal(
                400,
                f"{wish.model!r} cannot be fine-tuned: it does not chat.",
                param="model",
                code="model_not_available",
            )
        grader = wish.grader.model_dump(exclude_none=True) if wish.grader is not None else None
        if wish.grader is not None and grader is not None:
            asked = [grader, *(grader["graders"].values() if wish.grader.type == "multi" else ())]
            for judge in judges_of(wish.grader):
                found = await self.service.find(judge.model, caller)
                if found.folder is None or found.chat is None:
                    raise Refusal(400, f"{judge.model!r} cannot judge.", param="method.reinforcement.grader.model")
                for one in asked:
                    if one.get("model") == judge.model:
                        one["folder"] = str(found.folder.resolve())
        async with self._making:
            job = await asyncio.to_thread(self._queue, wish, served, grader, caller.id)
        self.foreman.wake(job.id)
        return job

    def _queue(self, wish: JobRequest, served: Served, grader: dict[str, Any] | None, owner: str) -> Job:
        id = f"ftjob-{secrets.token_hex(12)}"
        folder = self.foreman.folder / id
        seed = secrets.randbelow(2**31) if wish.seed is None else wish.seed
        try:
            with disk_errors(folder):
                (folder / "data").mkdir(parents=True, mode=0o700)
            train = self._examples(wish, "training_file", folder / "data" / TRAIN, served, grader, owner)
            has_valid = wish.validation_file is not None
            if has_valid:
                self._examples(wish, "validation_file", folder / "data" / VALID, served, None, owner)
            plan = plan_of(wish.kind, wish.wanted(), served, train, self.foreman.crew.num_threads)
            write_recipe(folder, plan, seed, has_valid)
            method = {"hyperparameters": plan.hyperparameters, **({} if grader is None else {"grader": _told(grader)})}
            root = wish.model.split(":")[1] if wish.model.startswith("ft:") else wish.model
            return self.jobs.add(
                owner,
                id,
                self.service.limits.jobs,
                base=wish.model,
                name=f"ft:{root}:{ORGANISATION}:{wish.suffix or ''}:{id[-SHORT:]}",
                training_file=wish.training_file,
                validation_file=wish.validation_file or "",
                method={"type": wish.kind, wish.kind: method},
                metadata=wish.metadata or {},
                seed=seed,
                plan=plan.to_json(),
                notes=_warnings(train),
            )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _examples(
        self, wish: JobRequest, param: str, target: Path, served: Served, grader: Mapping[str, Any] | None, owner: str
    ) -> Found:
        """Write a file's examples where the job reads them. Raises Refusal, for that file."""
        id = getattr(wish, param)
        try:
            file: File = self.files.about(owner, id)
            if file.purpose != "fine-tune":
                raise Refusal(
                    400, f"{id} has the purpose {file.purpose!r}, expected 'fine-tune'.", code="invalid_value"
                )
            held = file.found.get("kind")
            if held != wish.kind:
                raise Refusal(400, f"{id} holds {held} examples, and the method is {wish.kind}.", code="invalid_value")
            path, limits = self.files.path(owner, id), self.service.limits
            found = write_examples(path, target, served, limits, wish.kind, grader)
            if found.too_long == found.lines:
                raise Refusal(
                    400,
                    f"None of the {found.lines} examples fits into the context of {served.name}, "
                    f"{served.context_length} tokens.",
                    code="context_length_exceeded",
                )
            return found
        except NotFound as error:
            raise Refusal(400, error.message, param=param, code="not_found") from None
        except Refusal as refusal:
            raise Refusal(400, refusal.message, param=param, code=refusal.code) from None

    def delete_model(self, name: str, caller: Caller) -> None:
        """Delete a model that a job made. Raises Refusal for one that is not the caller's."""
        shelf = self.service.shelf
        tuned = shelf.about(name, caller) if shelf is not None else None
        if tuned is None:
            self.service.model(name)  # 404 where there is none
            raise Refusal(403, "Only models that a job of yours has made can be deleted.", code="model_not_deletable")
        self.jobs.drop_model(name)
        assert shelf is not None
        shelf.look()
        shutil.rmtree(tuned.folder, ignore_errors=True)


class Following:
    """A job's events from its first on, as they happen, until it has ended; as `EventStream` sends them."""

    has_news = False  # each leaves at once

    def __init__(self, jobs: Jobs, owner: str, id: str):
        self._jobs, self._owner, self._id = jobs, owner, id
        self._is_closed = False

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The events."""
        num_seen = 0
        while not self._is_closed:
            job, events = await asyncio.to_thread(self._jobs.news, self._owner, self._id, num_seen)
            for event in events:
                yield event.to_json()
            num_seen += len(events)
            if job.status in ENDED:
                return
            await asyncio.sleep(LOOK_EVERY_S)

    def close(self) -> None:
        """Nobody looks on any more; the job goes on."""
        self._is_closed = True


def job_json(job: Job) -> dict[str, Any]:
    """A job as the API shows it."""
    chosen = job.plan["hyperparameters"]
    shown = ("n_epochs", "batch_size", "learning_rate_multiplier")
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created),
        "finished_at": int(job.finished) or None,
        "model": job.base,
        "fine_tuned_model": job.name if job.status == "succeeded" else None,
        "organization_id": f"org-{ORGANISATION}",
        "status": job.status,
        "training_file": job.training_file,
        "validation_file": job.validation_file or None,
        "result_files": [job.result_file] if job.result_file else [],
        "hyperparameters": {name: chosen[name] for name in shown},
        "method": job.method,
        "trained_tokens": job.tokens if job.status == "succeeded" else None,
        "error": job.error or None,
        "estimated_finish": _estimate(job),
        "seed": job.seed,
        "metadata": job.metadata or None,
        "integrations": [],
    }


def _estimate(job: Job) -> int | None:
    """When a running job will have ended, from how far it has come; before its first line, from its plan."""
    if job.status != "running":
        return None
    if job.step:
        spent = time.time() - job.started
        return int(job.started + spent * max(1.0, job.plan["steps"] / job.step))
    return int(job.started + job.plan["seconds"]) if job.plan["seconds"] else None


def _told(grader: Mapping[str, Any]) -> dict[str, Any]:
    """A grader as its owner gave it: without the folders of judges."""
    told = {name: value for name, value in grader.items() if name != "folder"}
    if told["type"] == "multi":
        told["graders"] = {name: _told(one) for name, one in told["graders"].items()}
    return told


def _warnings(found: Found) -> list[dict[str, Any]]:
    if not found.too_long:
        return []
    said = f"{found.too_long} of {found.lines} examples do not fit into the context of {found.model} and are left out"
    return [{"level": "warn", "message": said}]
