import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from redis.exceptions import LockError

from registry.errors import (
    IdempotencyConflict,
    IllegalTransition,
    QueueFull,
    RecordNotFound,
    Superseded,
)
from registry.lifecycle import Records, Room
from registry.records import FamilyRecord, ModelRecord, WorkerRecord
from registry.repository import Reason, Repository
from tests.support.records import queued_model
from tests.support.sizing import NETWORK, SIZES


@pytest.fixture
def repository(client: redis.Redis) -> Repository:
    return Repository(client, generation_ttl_seconds=60)


@pytest.fixture
def models(repository: Repository) -> Records[ModelRecord]:
    return repository.models


def test_the_life_of_a_model(models: Records[ModelRecord]) -> None:
    record = models.create(queued_model())
    assert models.get(record.id) == record
    for status in ("assembling", "retraining", "verifying", "ready", "deleted"):
        assert models.change(record.id, status=status).status == status
    assert models.page(0, 10).items == []
    assert models.active() == []


@pytest.mark.parametrize(
    ("path", "status"),
    [((), "ready"), (("cancelled",), "assembling"), (("failed",), "ready")],
)
def test_an_illegal_transition_changes_nothing(
    models: Records[ModelRecord], path: tuple[str, ...], status: str
) -> None:
    record = models.create(queued_model())
    for step in path:
        record = models.change(record.id, status=step)
    with pytest.raises(IllegalTransition, match=f"cannot be {status}"):
        models.change(record.id, status=status)
    assert models.get(record.id) == record


def test_of_two_final_states_one_wins_for_all_writers(models: Records[ModelRecord]) -> None:
    record = models.create(queued_model())
    models.change(record.id, status="assembling")
    barrier = threading.Barrier(8)

    def finish(index: int) -> str:
        barrier.wait()
        try:
            models.change(record.id, status="cancelled" if index % 2 else "failed")
        except IllegalTransition:
            return "late"
        return "first"

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(finish, range(8)))
    winner = models.get(record.id).status
    kinds = ["cancelled" if index % 2 else "failed" for index in range(8)]
    assert results == ["first" if kind == winner else "late" for kind in kinds]


def test_nothing_is_found_under_an_unknown_id(models: Records[ModelRecord]) -> None:
    with pytest.raises(RecordNotFound, match="no model 'm-x'"):
        models.get("m-x")
    with pytest.raises(RecordNotFound):
        models.change("m-x", status="failed")
    assert models.claim("m-x", 3, 5) is None


def test_a_claim_is_exclusive_until_it_is_released(models: Records[ModelRecord]) -> None:
    record = models.create(queued_model())
    first = models.claim(record.id, 3, 5)
    assert first is not None
    assert (first.record.status, first.record.attempts) == ("assembling", 1)
    assert models.claim(record.id, 3, 5) is None
    assert models.leased(record.id)
    first.lease.release()
    assert not models.leased(record.id)
    second = models.claim(record.id, 3, 5)
    assert second is not None
    assert second.record.attempts == 2


def test_a_lease_that_ran_out_cannot_be_renewed(models: Records[ModelRecord]) -> None:
    record = models.create(queued_model())
    slow = models.claim(record.id, 3, 0.01)
    assert slow is not None
    while models.leased(record.id):
        pass
    fast = models.claim(record.id, 3, 5)
    assert fast is not None
    for use in (slow.lease.reacquire, slow.lease.release):
        with pytest.raises(LockError):
            use()
    assert models.leased(record.id)


def test_what_was_thought_to_be_known_does_not_undo_what_came_after(
    models: Records[ModelRecord],
) -> None:
    old = models.create(queued_model())
    models.change(old.id, status="assembling", revision=0)
    changed = models.change(old.id, known=old, status="retraining")
    assert (changed.status, changed.revision) == ("retraining", 0)
    assert models.get(old.id) == changed
    models.change(old.id, status="cancelled")
    with pytest.raises(IllegalTransition):
        models.change(old.id, known=changed, status="verifying")


def test_an_overtaken_attempt_cannot_write(models: Records[ModelRecord]) -> None:
    record = models.create(queued_model())
    for _ in range(2):
        claim = models.claim(record.id, 3, 5)
        assert claim is not None
        claim.lease.release()
    with pytest.raises(Superseded, match="attempt 2"):
        models.change(record.id, attempt=1, status="retraining")
    models.change(record.id, attempt=2, status="retraining")
    models.change(record.id, status="cancelled")
    with pytest.raises(Superseded, match="is cancelled"):
        models.change(record.id, attempt=2, status="verifying")


def test_attempts_are_capped(models: Records[ModelRecord]) -> None:
    record = models.create(queued_model())
    for _ in range(2):
        claim = models.claim(record.id, 2, 5)
        assert claim is not None
        claim.lease.release()
    assert models.claim(record.id, 2, 5) is None
    failed = models.get(record.id)
    assert failed.status == "failed"
    assert failed.error is not None
    assert "2 attempts" in failed.error
    assert not models.leased(record.id)


def test_pages_are_newest_first(models: Records[ModelRecord]) -> None:
    ids = [models.create(queued_model()).id for _ in range(5)]
    first = models.page(0, 2)
    assert [record.id for record in first.items] == [ids[4], ids[3]]
    assert first.next_offset == 2
    last = models.page(4, 2)
    assert [record.id for record in last.items] == [ids[0]]
    assert last.next_offset is None


def test_owners_have_pages_and_idempotency_keys_of_their_own(
    models: Records[ModelRecord],
) -> None:
    mine, other = (
        models.create(queued_model().replace(owner=owner), "key", "body") for owner in ("me", "you")
    )
    assert mine.id != other.id
    assert [record.id for record in models.page(0, 10, "me").items] == [mine.id]
    assert models.replay("you", "key", "body") == other
    models.change(mine.id, status="deleted")
    assert models.page(0, 10, "me").items == []
    assert [record.id for record in models.page(0, 10).items] == [other.id]


@pytest.mark.parametrize(
    ("room", "whose"), [(Room(all=2), "here"), (Room(all=9, of_owner=2), "of yours")]
)
def test_there_is_room_for_so_many_at_once(
    models: Records[ModelRecord], room: Room, whose: str
) -> None:
    first, _ = (models.create(queued_model(), room=room) for _ in range(2))
    with pytest.raises(QueueFull, match=f"2 models {whose} are not finished") as full:
        models.create(queued_model(), "key", "body", room)
    with pytest.raises(QueueFull, match=str(full.value)):
        models.require_room("", room)
    assert full.value.retry_seconds == 1
    assert len(models.page(0, 10).items) == 2
    for status in ("assembling", "retraining", "verifying", "ready"):
        models.change(first.id, status=status)
    models.require_room("", room)
    assert models.create(queued_model(), "key", "body", room).status == "queued"


def test_many_at_once_do_not_overfill(models: Records[ModelRecord]) -> None:
    def create(_: int) -> bool:
        try:
            models.create(queued_model(), room=Room(of_owner=3))
        except QueueFull:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(create, range(20))) == 3


def test_retrying_is_advised_at_the_pace_of_the_last_ones(
    models: Records[ModelRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = time.time()
    monkeypatch.setattr("registry.lifecycle.time.time", lambda: clock)
    for _ in range(4):
        record = models.create(queued_model())
        for status in ("assembling", "retraining", "verifying", "ready"):
            models.change(record.id, status=status)
        clock += 20
    models.create(queued_model())
    with pytest.raises(QueueFull, match="retry in 20 s"):
        models.create(queued_model(), room=Room(all=1))


def test_an_idempotency_key_gives_the_same_record(models: Records[ModelRecord]) -> None:
    first = models.create(queued_model(), "key", "body")
    assert models.create(queued_model(), "key", "body").id == first.id
    with pytest.raises(IdempotencyConflict):
        models.create(queued_model(), "key", "another body")
    assert len(models.page(0, 10).items) == 1


def test_a_key_whose_record_was_never_stored_is_taken_up(
    client: redis.Redis, models: Records[ModelRecord]
) -> None:
    first = models.create(queued_model(), "key", "body")
    client.delete(f"fineserve:model:{first.id}")
    assert models.create(queued_model(), "key", "body").id == first.id
    assert models.get(first.id).status == "queued"


def a_worker(worker_id: str) -> WorkerRecord:
    return WorkerRecord(
        id=worker_id, queue="build", device_class="cpu", torch_version="2", families=["tiny"]
    )


def a_family(name: str) -> FamilyRecord:
    return FamilyRecord(
        name=name,
        network=NETWORK,
        sizes=SIZES,
        class_names=[],
        licence="",
        trained_steps=1,
        fingerprint="f",
        quality=None,
    )


def test_workers_are_forgotten_when_their_heart_stops(
    repository: Repository, client: redis.Redis
) -> None:
    repository.heartbeat(a_worker("a"), 60)
    repository.heartbeat(a_worker("b"), 60)
    assert repository.workers() == [a_worker("a"), a_worker("b")]
    repository.heartbeat(a_worker("b"), 0.001)
    time.sleep(0.01)
    assert repository.workers() == [a_worker("a")]
    repository.heartbeat(a_worker("a"), 60)
    assert client.zrange("fineserve:worker:announced", 0, -1) == ["a"]


def test_a_record_that_cannot_be_read_hides_no_other(
    repository: Repository, client: redis.Redis
) -> None:
    broken, whole = (repository.models.create(queued_model()) for _ in range(2))
    client.set(f"fineserve:model:{broken.id}", '{"id": "m-1"}')
    assert [record.id for record in repository.models.active()] == [whole.id]
    assert [record.id for record in repository.models.page(0, 9).items] == [whole.id]
    later = json.loads(whole.model_dump_json()) | {"of_a_later_release": 1}
    client.set(f"fineserve:model:{whole.id}", json.dumps(later))
    assert repository.models.get(whole.id) == whole


def test_families_are_listed_by_name_and_announced_again_without_repeats(
    repository: Repository,
) -> None:
    for name in ("b", "a", "b"):
        repository.announce_family(a_family(name))
    assert repository.families() == [a_family("a"), a_family("b")]


def test_workers_and_families_of_one_name_are_told_apart(repository: Repository) -> None:
    repository.announce_family(a_family("same"))
    repository.heartbeat(a_worker("same"), 60)
    assert repository.families() == [a_family("same")]
    assert repository.workers() == [a_worker("same")]


def test_an_announcement_of_another_release_hides_no_other(
    repository: Repository, client: redis.Redis
) -> None:
    for name in ("a", "b"):
        repository.announce_family(a_family(name))
        repository.heartbeat(a_worker(name), 60)
    for kind in ("family", "worker"):
        client.set(f"fineserve:{kind}:a", '{"of_another_release": 1}')
    assert repository.families() == [a_family("b")]
    assert repository.family("a") is None
    assert repository.workers() == [a_worker("b")]


def test_a_profile_is_kept_for_each_device_class_and_family(repository: Repository) -> None:
    assert repository.profile("cpu", "tiny") is None
    assert repository.profiled_classes("tiny") == []
    for device_class, family in (("gpu", "tiny"), ("cpu", "tiny"), ("cpu", "huge")):
        content = f"{family} on {device_class}"
        repository.change_profile(device_class, family, lambda _, content=content: content)
    assert repository.profile("cpu", "tiny") == "tiny on cpu"
    assert repository.profile("gpu", "tiny") == "tiny on gpu"
    assert repository.profiled_classes("tiny") == ["cpu", "gpu"]
    assert repository.profiled_classes("huge") == ["cpu"]


def test_of_many_changes_to_a_profile_none_is_lost(repository: Repository) -> None:
    barrier = threading.Barrier(4)

    def count(_: int) -> None:
        barrier.wait()
        for _ in range(5):
            repository.change_profile("cpu", "tiny", lambda raw: str(int(raw or 0) + 1))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count, range(4)))
    assert repository.profile("cpu", "tiny") == "20"


def test_a_change_that_fails_leaves_the_profile_as_it_was(repository: Repository) -> None:
    repository.change_profile("cpu", "tiny", lambda _: "good")
    with pytest.raises(ZeroDivisionError):
        repository.change_profile("cpu", "tiny", lambda _: str(1 / 0))
    assert repository.profile("cpu", "tiny") == "good"


def test_a_lock_is_had_by_one_at_a_time(repository: Repository) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work(index: int) -> None:
        with repository.lock("profile", 5):
            inside.append(index)
            most.append(len(inside))
            time.sleep(0.01)
            inside.remove(index)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    assert most == [1, 1, 1]


def test_the_lock_of_a_dead_worker_opens_by_itself(repository: Repository) -> None:
    assert repository.lock("profile", 0.05).acquire()
    with repository.lock("other", 5), repository.lock("profile", 5):
        pass


def test_only_the_first_who_asks_gets_a_turn(repository: Repository) -> None:
    assert repository.once("job", 60)
    assert not repository.once("job", 60)
    assert repository.failure_of("job") is None


def test_a_failure_is_told_for_a_while_and_then_there_is_another_turn(
    repository: Repository,
) -> None:
    assert repository.once("job", 60)
    reason = Reason("no luck", "storage-full")
    repository.fail_once("job", reason, 0.1)
    assert repository.failure_of("job") == reason
    time.sleep(0.15)
    assert repository.failure_of("job") is None
    assert repository.once("job", 60)
