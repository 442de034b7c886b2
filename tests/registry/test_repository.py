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
    RecordUnreadable,
    Superseded,
)
from registry.events import MAX_EVENTS
from registry.lifecycle import GIVEN_UP_SECONDS, Claim, Records, Room
from registry.records import FamilyRecord, ModelRecord, WorkerRecord
from registry.repository import Reason, Repository
from tests.support.records import queued_model
from tests.support.sizing import NETWORK, SIZES

Models = Records[ModelRecord]
BUILT = ("assembling", "retraining", "verifying", "ready")


@pytest.fixture
def repository(client: redis.Redis) -> Repository:
    return Repository(client, generation_ttl_seconds=60)


@pytest.fixture
def models(repository: Repository) -> Models:
    return repository.models


@pytest.fixture
def record(models: Models) -> ModelRecord:
    """A queued model."""
    return models.create(queued_model())


def build(models: Models, model_id: str) -> None:
    for status in BUILT:
        assert models.change(model_id, status=status).status == status


def test_a_model_is_listed_until_it_is_deleted(models: Models, record: ModelRecord) -> None:
    assert models.get(record.id) == record
    build(models, record.id)
    assert models.change(record.id, status="deleted").status == "deleted"
    assert models.page(0, 10).items == []
    assert models.active() == []


@pytest.mark.parametrize(
    ("path", "status"), [((), "ready"), (("cancelled",), "assembling"), (("failed",), "ready")]
)
def test_an_illegal_transition_changes_nothing(
    models: Models, record: ModelRecord, path: tuple[str, ...], status: str
) -> None:
    for step in path:
        record = models.change(record.id, status=step)
    with pytest.raises(IllegalTransition, match=f"cannot be {status}"):
        models.change(record.id, status=status)
    assert models.get(record.id) == record


def test_one_of_two_final_states_wins_for_all_writers(models: Models, record: ModelRecord) -> None:
    models.change(record.id, status="assembling")
    barrier = threading.Barrier(8)

    def finish(status: str) -> str:
        barrier.wait()
        try:
            models.change(record.id, status=status)
        except IllegalTransition:
            return "late"
        return "first"

    statuses = ["failed", "cancelled"] * 4
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(finish, statuses))
    winner = models.get(record.id).status
    assert results == ["first" if status == winner else "late" for status in statuses]


def test_nothing_is_found_under_an_unknown_id(models: Models) -> None:
    with pytest.raises(RecordNotFound, match="no model 'm-x'"):
        models.get("m-x")
    with pytest.raises(RecordNotFound):
        models.change("m-x", status="failed")
    assert models.claim("m-x", 3, 5) is None


def claimed(models: Models, record: ModelRecord, seconds: float = 5) -> Claim:
    claim = models.claim(record.id, 3, seconds)
    assert claim is not None
    return claim


def test_a_claim_is_exclusive_until_it_is_released(models: Models, record: ModelRecord) -> None:
    first = claimed(models, record)
    assert (first.record.status, first.record.attempts) == ("assembling", 1)
    assert models.claim(record.id, 3, 5) is None
    assert models.leased(record.id)
    first.lease.release()
    assert not models.leased(record.id)
    assert claimed(models, record).record.attempts == 2


def test_a_lease_that_ran_out_cannot_be_renewed(models: Models, record: ModelRecord) -> None:
    slow = claimed(models, record, 0.01)
    while models.leased(record.id):
        pass
    claimed(models, record)
    for use in (slow.lease.reacquire, slow.lease.release):
        with pytest.raises(LockError):
            use()
    assert models.leased(record.id)


def test_what_was_known_does_not_undo_what_came_after(models: Models, record: ModelRecord) -> None:
    models.change(record.id, status="assembling", revision=0)
    changed = models.change(record.id, known=record, status="retraining")
    assert (changed.status, changed.revision) == ("retraining", 0)
    assert models.get(record.id) == changed
    models.change(record.id, status="cancelled")
    with pytest.raises(IllegalTransition):
        models.change(record.id, known=changed, status="verifying")


def test_an_overtaken_attempt_cannot_write(models: Models, record: ModelRecord) -> None:
    for _ in range(2):
        claimed(models, record).lease.release()
    with pytest.raises(Superseded, match="attempt 2"):
        models.change(record.id, attempt=1, status="retraining")
    models.change(record.id, attempt=2, status="retraining")
    models.change(record.id, status="cancelled")
    with pytest.raises(Superseded, match="is cancelled"):
        models.change(record.id, attempt=2, status="verifying")


def test_attempts_are_capped(models: Models, record: ModelRecord) -> None:
    for _ in range(3):
        claimed(models, record).lease.release()
    assert models.claim(record.id, 3, 5) is None
    failed = models.get(record.id)
    assert failed.status == "failed"
    assert failed.error is not None
    assert "3 attempts" in failed.error
    assert not models.leased(record.id)


def test_pages_are_newest_first(models: Models) -> None:
    ids = [models.create(queued_model()).id for _ in range(5)]
    first = models.page(0, 2)
    assert [record.id for record in first.items] == [ids[4], ids[3]]
    assert first.next_offset == 2
    last = models.page(4, 2)
    assert [record.id for record in last.items] == [ids[0]]
    assert last.next_offset is None


def test_owners_have_pages_and_idempotency_keys_of_their_own(models: Models) -> None:
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
def test_there_is_room_up_to_the_limit(models: Models, room: Room, whose: str) -> None:
    first, _ = (models.create(queued_model(), room=room) for _ in range(2))
    with pytest.raises(QueueFull, match=f"2 models {whose} are not finished") as full:
        models.create(queued_model(), "key", "body", room)
    with pytest.raises(QueueFull, match=str(full.value)):
        models.require_room("", room)
    assert full.value.retry_seconds == 1
    assert len(models.page(0, 10).items) == 2
    build(models, first.id)
    models.require_room("", room)
    assert models.create(queued_model(), "key", "body", room).status == "queued"


def test_many_at_once_do_not_overfill(models: Models) -> None:
    def create(_: int) -> bool:
        try:
            models.create(queued_model(), room=Room(of_owner=3))
        except QueueFull:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(create, range(20))) == 3


def test_retries_are_advised_at_the_last_pace(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = time.time()
    monkeypatch.setattr("registry.lifecycle.time.time", lambda: clock)
    for _ in range(4):
        build(models, models.create(queued_model()).id)
        clock += 20
    models.create(queued_model())
    with pytest.raises(QueueFull, match="retry in 20 s"):
        models.create(queued_model(), room=Room(all=1))


def test_an_idempotency_key_gives_the_same_record(models: Models) -> None:
    first = models.create(queued_model(), "key", "body")
    assert models.create(queued_model(), "key", "body").id == first.id
    with pytest.raises(IdempotencyConflict):
        models.create(queued_model(), "key", "another body")
    assert len(models.page(0, 10).items) == 1


def test_a_key_without_its_record_is_taken_up(client: redis.Redis, models: Models) -> None:
    first = models.create(queued_model(), "key", "body")
    client.delete(f"fineserve:model:{first.id}")
    assert models.create(queued_model(), "key", "body").id == first.id
    assert models.get(first.id).status == "queued"


def a_worker(worker_id: str) -> WorkerRecord:
    return WorkerRecord(
        id=worker_id, queue="build", device_class="cpu", torch_version="2", families=["tiny"]
    )


def a_family(name: str) -> FamilyRecord:
    about = {"class_names": [], "licence": "", "trained_steps": 1, "fingerprint": "f"}
    return FamilyRecord(name=name, network=NETWORK, sizes=SIZES, quality=None, **about)


def test_workers_without_heartbeats_are_gone(repository: Repository, client: redis.Redis) -> None:
    repository.heartbeat(a_worker("a"), 60)
    repository.heartbeat(a_worker("b"), 60)
    assert repository.workers() == [a_worker("a"), a_worker("b")]
    repository.heartbeat(a_worker("b"), 0.001)
    time.sleep(0.01)
    assert repository.workers() == [a_worker("a")]
    repository.heartbeat(a_worker("a"), 60)
    assert client.zrange("fineserve:worker:announced", 0, -1) == ["a"]


def test_workers_that_come_on_demand_are_expected_while_none_lives(client: redis.Redis) -> None:
    for on_demand in (False, True):
        client.flushall()
        repository = Repository(client, 60, workers_on_demand=on_demand)
        repository.heartbeat(a_worker("a"), 60)
        assert repository.expected_workers() == [a_worker("a")]
        repository.take_back_heartbeat("a")
        assert repository.workers() == []
        assert repository.expected_workers() == ([a_worker("a")] if on_demand else [])
        assert repository.served("build", "cpu"), "work for it waits"
        repository.announce_family(a_family("b"))
        assert (client.ttl("fineserve:family:b") > 10**6) == on_demand


def test_a_broken_record_hides_no_other(repository: Repository, client: redis.Redis) -> None:
    broken, whole = (repository.models.create(queued_model()) for _ in range(2))
    client.set(f"fineserve:model:{broken.id}", '{"id": "m-1"}')
    assert [record.id for record in repository.models.active()] == [whole.id]
    assert [record.id for record in repository.models.page(0, 9).items] == [whole.id]
    later = json.loads(whole.model_dump_json()) | {"of_a_later_release": 1}
    client.set(f"fineserve:model:{whole.id}", json.dumps(later))
    assert repository.models.get(whole.id) == whole


def test_a_latency_of_an_earlier_release_is_the_95th_percentile(
    repository: Repository, client: redis.Redis
) -> None:
    record = repository.models.create(queued_model(max_latency_ms=800))
    earlier = json.loads(record.model_dump_json())
    del earlier["budget"]["latency_percentile"]
    client.set(f"fineserve:model:{record.id}", json.dumps(earlier))
    read = repository.models.get(record.id)
    assert read == record
    assert read.budget.constraints.latency_percentile == 95


def test_families_are_listed_once_each_and_by_name(repository: Repository) -> None:
    for name in ("b", "a", "b"):
        repository.announce_family(a_family(name))
    assert repository.families() == [a_family("a"), a_family("b")]


def test_a_broken_announcement_hides_no_other(repository: Repository, client: redis.Redis) -> None:
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


def test_no_change_to_a_profile_is_lost(repository: Repository) -> None:
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
    inside = threading.Semaphore(1)

    def work(_: int) -> bool:
        with repository.lock("profile", 5):
            alone = inside.acquire(blocking=False)
            time.sleep(0.01)
            inside.release()
            return alone

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, range(3)))


def test_the_lock_of_a_dead_worker_opens_by_itself(repository: Repository) -> None:
    assert repository.lock("profile", 0.05).acquire()
    with repository.lock("other", 5), repository.lock("profile", 5):
        pass


def test_a_turn_is_had_once_and_again_after_its_failure_was_told(repository: Repository) -> None:
    assert repository.once("job", 60)
    assert not repository.once("job", 60)
    assert repository.failure_of("job") is None
    reason = Reason("no luck", "storage-full")
    repository.fail_once("job", reason, 0.1)
    assert repository.failure_of("job") == reason
    time.sleep(0.15)
    assert repository.failure_of("job") is None
    assert repository.once("job", 60)


def test_what_was_given_up_expires_and_leaves_the_lists(
    models: Models, record: ModelRecord, client: redis.Redis
) -> None:
    models.change(record.id, status="cancelled")
    key = f"fineserve:model:{record.id}"
    assert 0 < client.ttl(key) <= GIVEN_UP_SECONDS
    assert [found.id for found in models.page(0, 10).items] == [record.id]
    client.delete(key)
    assert models.page(0, 10).items == []
    assert client.zcard("fineserve:models") == 0


def test_the_last_events_are_kept(models: Models, record: ModelRecord, client: redis.Redis) -> None:
    for number in range(MAX_EVENTS + 500):
        models.tell(record.id, "progress", str(number))
    length = client.xlen(f"fineserve:model:{record.id}:events")
    assert MAX_EVENTS <= length < 1.1 * MAX_EVENTS, "Redis cuts whole blocks"


def test_what_was_refused_keeps_no_key(models: Models) -> None:
    models.create(queued_model())
    with pytest.raises(QueueFull):
        models.create(queued_model(), "a key", "one body", Room(all=1))
    assert models.create(queued_model(), "a key", "another body").status == "queued"


@pytest.mark.parametrize("content", ["", "{}", '{"owner": "somebody"}', "[1"])
def test_a_record_that_cannot_be_read_can_be_deleted(
    models: Models, record: ModelRecord, client: redis.Redis, content: str
) -> None:
    client.set(f"fineserve:model:{record.id}", content or "no JSON")
    with pytest.raises(RecordUnreadable, match="delete it"):
        models.get(record.id)
    models.discard(record.id)
    with pytest.raises(RecordNotFound):
        models.get(record.id)
    with pytest.raises(RecordNotFound):
        models.discard(record.id)
    assert (models.page(0, 10).items, models.count_active()) == ([], 0)


def test_pages_lose_nothing_where_records_have_expired(models: Models, client: redis.Redis) -> None:
    made = [models.create(queued_model()).id for _ in range(7)]
    for model_id in made[2:5]:
        client.delete(f"fineserve:model:{model_id}")
    found, offset = [], 0
    while offset is not None:
        page = models.page(offset, 3)
        found += [record.id for record in page.items]
        offset = page.next_offset
    assert sorted(found) == sorted(made[:2] + made[5:])


def test_a_refused_request_does_not_free_the_key_of_one_that_came_after(models: Models) -> None:
    models.create(queued_model(), "a key", "a body")
    models._keys.give_back("", "a key", unless="fineserve:model:none")
    record = models.create(queued_model(), "b key", "a body")
    models._keys.give_back("", "b key", unless=f"fineserve:model:{record.id}")
    assert models.replay("", "b key", "a body") == record
    assert models.replay("", "a key", "a body") is None
