import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from celery import Celery
from celery.utils.dispatch import Signal

import worker.__main__
from registry.settings import Settings
from worker.app import Worker, make_app
from worker.build.verify import VerificationError
from worker.runtime import Runtime
from worker.sampling.jobs import EngineStopped

Serve = Callable[[set[str]], Worker]


class Signals:
    """Celery's, without those who listen elsewhere."""

    def __init__(self) -> None:
        self.init, self.shutting_down = Signal(name="init"), Signal(name="shutting down")


class Controller:
    """What Celery says starts."""

    def __init__(self, app: Celery) -> None:
        self.app = app


@pytest.fixture
def profiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The families that were profiled."""
    families: list[str] = []
    monkeypatch.setattr("worker.app.ensure_profile", lambda _, name: families.append(name))
    return families


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Runtime]]:
    """What has been started; it is stopped when the test ends."""
    started: list[Runtime] = []
    original = Runtime.start

    def start(settings: Settings) -> Runtime:
        started.append(original(settings))
        return started[-1]

    monkeypatch.setattr(Runtime, "start", start)
    yield started
    for runtime in started:
        runtime.stopping.set()
    for thread in threading.enumerate():
        if thread.name == "housekeeping":
            thread.join()


@pytest.fixture
def serve(settings: Settings, workers: list[Runtime]) -> Serve:
    def start(queues: set[str]) -> Worker:
        worker = Worker(settings)
        worker.serve(queues)
        return worker

    return start


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> Signals:
    signals = Signals()
    monkeypatch.setattr("worker.app.worker_init", signals.init)
    monkeypatch.setattr("worker.app.worker_shutting_down", signals.shutting_down)
    return signals


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


def test_a_worker_is_heard_of_while_it_profiles(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the service can say what is missing: a profile, not a worker."""
    heard: list[str] = []
    monkeypatch.setattr(
        "worker.app.ensure_profile", lambda runtime, _: heard.extend(heard_of(runtime))
    )
    serve({"build"})
    assert heard == ["build"]


def test_a_sample_worker_needs_no_profile(serve: Serve, profiled: list[str]) -> None:
    assert heard_of(serve({"sample"}).runtime) == ["sample"]
    assert profiled == []


def test_a_family_that_is_not_calibrated_is_served_without_a_profile(
    serve: Serve, profiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learngenes.family.family.read_quality", lambda *_: None)
    runtime = serve({"build"}).runtime
    assert profiled == []
    assert runtime.repository.families()[0].quality is None


def test_the_queues_that_celery_consumes_say_what_kind_of_worker_it_is(
    settings: Settings, signals: Signals, workers: list[Runtime], profiled: list[str]
) -> None:
    app = make_app(settings)
    app.amqp.queues.select(["build.cpu-somebody-s-2-threads"])
    signals.init.send(sender=Controller(app))
    (runtime,) = workers
    assert profiled == ["tiny"]
    assert heard_of(runtime) == ["build"]
    signals.shutting_down.send(sender=None)
    assert runtime.stopping.is_set()


@pytest.mark.parametrize("error", [EngineStopped("no memory"), OSError(28, "No space left")])
def test_a_worker_that_cannot_start_ends(
    settings: Settings, signals: Signals, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("worker.app.Sampling", fail)
    app = make_app(settings)
    app.amqp.queues.select(["sample.a-device"])
    with pytest.raises(SystemExit) as ended:
        signals.init.send(sender=Controller(app))
    assert ended.value.code == 1


def test_a_worker_that_cannot_profile_ends_and_is_started_again(
    settings: Settings,
    signals: Signals,
    workers: list[Runtime],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def die(*_: object) -> None:
        raise VerificationError("out of memory")

    monkeypatch.setattr("worker.app.ensure_profile", die)
    app = make_app(settings)
    app.amqp.queues.select(["build.a-device"])
    with pytest.raises(SystemExit) as ended:
        signals.init.send(sender=Controller(app))
    assert ended.value.code == 1


def test_a_worker_whose_family_is_corrupt_ends_for_good(
    settings: Settings, signals: Signals, families_dir: Path
) -> None:
    (families_dir / "tiny" / "quality.json").write_text("{}")
    app = make_app(settings)
    with pytest.raises(SystemExit) as ended:
        signals.init.send(sender=Controller(app))
    assert ended.value.code == os.EX_CONFIG


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
