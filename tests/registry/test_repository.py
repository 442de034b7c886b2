import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from redis.exceptions import LockError

from registry.errors import IdempotencyConflict, IllegalTransition, RecordNotFound, Superseded
from registry.records import ModelRecord, WorkerRecord
from registry.repository import Records, Repository
from tests.records import queued_model


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


def test_workers_are_forgotten_when_their_heart_stops(repository: Repository) -> None:
    worker = WorkerRecord(id="w", queue="build", device="cpu", families=["tiny"])
    repository.heartbeat(worker, 60)
    assert repository.workers() == [worker]
    repository.heartbeat(worker, 0.001)
    for _ in range(100):
        if not repository.workers():
            break
    assert repository.workers() == []


def test_only_the_first_who_asks_gets_a_turn(repository: Repository) -> None:
    assert repository.once("job", 60)
    assert not repository.once("job", 60)
