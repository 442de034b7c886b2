import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

import worker.__main__
from registry.settings import Settings
from worker.app import Process, Worker
from worker.build.verify import VerificationError
from worker.runtime import Runtime
from worker.sampling.jobs import EngineStopped
from worker.sampling.sample import Sampling

Serve = Callable[[set[str]], Worker]


@dataclass
class Workers:
    """Makes them, with what they profile and sample with in place of the slow; ends them, too."""

    profile: Callable[[Runtime, str], object]
    sampling: Callable[[Runtime], Sampling] = Sampling
    started: list[Worker] = field(default_factory=list)

    def make(self, settings: Settings) -> Worker:
        self.started.append(Worker(settings, profile=self.profile, sampling=self.sampling))
        return self.started[-1]


@pytest.fixture
def profiled() -> list[str]:
    """The families that were profiled."""
    return []


@pytest.fixture
def workers(profiled: list[str]) -> Iterator[Workers]:
    workers = Workers(profile=lambda _, name: profiled.append(name))
    yield workers
    for made in workers.started:
        made.runtime.stopping.set()
    for thread in threading.enumerate():
        if thread.name in ("heartbeat", "lost work", "store"):
            thread.join()


@pytest.fixture
def serve(settings: Settings, workers: Workers) -> Serve:
    def start(queues: set[str]) -> Worker:
        worker = workers.make(settings)
        worker.serve(queues)
        return worker

    return start


@pytest.fixture
def process(settings: Settings, workers: Workers) -> Process:
    return Process(settings, workers.make)


def start(process: Process, queue: str) -> None:
    """As Celery does."""
    process.app.amqp.queues.select([queue])
    process.start(sender=SimpleNamespace(app=process.app))


def exit_status(process: Process, queue: str) -> object:
    """Status with which a worker ends that cannot start."""
    with pytest.raises(SystemExit) as ended:
        start(process, queue)
    return ended.value.code


def heard_of(runtime: Runtime) -> list[str]:
    """The queues of workers whose heart beats."""
    while not (beats := runtime.repository.workers()):
        pass
    return [beat.queue for beat in beats]


def test_a_build_worker_profiles_its_families(serve: Serve, profiled: list[str]) -> None:
    runtime = serve({"build"}).runtime
    assert profiled == ["tiny"]
    assert heard_of(runtime) == ["build"]
    assert [family.name for family in runtime.repository.families()] == ["tiny"]


def test_a_worker_is_heard_of_while_it_profiles(serve: Serve, workers: Workers) -> None:
    """So that the service can say what is missing: a profile, not a worker."""
    heard: list[str] = []
    workers.profile = lambda runtime, _: heard.extend(heard_of(runtime))
    serve({"build"})
    assert heard == ["build"]


def test_a_sample_worker_needs_no_profile(serve: Serve, profiled: list[str]) -> None:
    assert heard_of(serve({"sample"}).runtime) == ["sample"]
    assert profiled == []


def test_a_family_that_is_not_calibrated_is_served_without_a_profile(
    serve: Serve, profiled: list[str], families_dir: Path
) -> None:
    file = families_dir / "tiny" / "family.json"
    manifest = json.loads(file.read_text())
    del manifest["sha256"]["quality.json"]
    file.write_text(json.dumps(manifest))
    runtime = serve({"build"}).runtime
    assert profiled == []
    assert runtime.repository.families()[0].quality is None


def test_the_queues_that_celery_consumes_say_what_kind_of_worker_it_is(
    process: Process, profiled: list[str]
) -> None:
    start(process, "build.cpu-somebody-s-2-threads")
    assert profiled == ["tiny"]
    assert heard_of(process.worker.runtime) == ["build"]
    process.stop()
    assert process.worker.runtime.stopping.is_set()


@pytest.mark.parametrize(
    ("queue", "work", "error"),
    [
        ("sample", "sampling", EngineStopped("no memory")),
        ("sample", "sampling", OSError(28, "No space left")),
        ("build", "profile", VerificationError("out of memory")),
    ],
)
def test_a_worker_that_cannot_start_ends_and_is_started_again(
    process: Process, workers: Workers, queue: str, work: str, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    setattr(workers, work, fail)
    assert exit_status(process, f"{queue}.a-device") == 1


def test_a_worker_whose_family_is_corrupt_ends_for_good(
    process: Process, families_dir: Path
) -> None:
    (families_dir / "tiny" / "quality.json").write_text("{}")
    assert exit_status(process, "build.a-device") == os.EX_CONFIG


@pytest.mark.parametrize("queue", ["build", "sample"])
def test_a_worker_takes_work_for_its_own_device(
    queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", ["worker", queue])
    monkeypatch.setattr(worker.__main__, "device_class", lambda _: "this-device")
    monkeypatch.setattr(worker.__main__.app, "worker_main", started.append)
    worker.__main__.main()
    (words,) = started
    assert words[words.index("--queues") + 1] == f"{queue}.this-device"


@pytest.mark.parametrize("words", [[], ["paint"], ["build", "sample"]])
def test_a_worker_says_how_it_is_used(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["worker", *words])
    with pytest.raises(SystemExit, match=r"usage: python -m worker {build\|sample\|verify}"):
        worker.__main__.main()
