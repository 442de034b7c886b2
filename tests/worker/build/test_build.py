import base64
import dataclasses
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore
import pytest
import redis
import torch
from obstore.store import MemoryStore

from learngenes.config import DType, Kind, Mode
from learngenes.family.family import RANDOM, save_family, write_quality
from learngenes.model.dense import materialised
from learngenes.model.factors import DenseLayers
from learngenes.training.retrain import retrain
from learngenes.training.tuning import Progress
from registry.errors import ArtifactError
from registry.records import ModelRecord, ModelStatus
from registry.store import served_name
from registry.store.objects import ObjectStore
from tests.support.builds import build, verify_here
from tests.support.devices import keep_profile, made_up_profile
from tests.support.records import queued_model, revision_name
from tests.support.sizing import SIZES, quality_table, with_imported
from tests.worker.conftest import MakeModel, build_housekeeping, told
from worker.artifacts import OWN_FILE, load_own
from worker.housekeeping import Patience
from worker.runtime import Runtime


def statuses(runtime: Runtime, model_id: str) -> list[object]:
    return [event["status"] for event in told(runtime, model_id, "status")]


def enqueued(client: redis.Redis, queue: str) -> list[str]:
    """The models that messages in a queue name."""
    messages = [json.loads(raw) for raw in client.lrange(queue, 0, -1)]
    return [json.loads(base64.b64decode(message["body"]))[0][0] for message in messages]


def lose(runtime: Runtime, *model_ids: str) -> None:
    """Begin to build models, and end as a worker does that is killed."""
    models = runtime.repository.models
    for model_id in model_ids:
        models.claim(model_id, 3, 0.01)
    while any(map(models.leased, model_ids)):
        pass


def test_a_queued_model_becomes_ready(runtime: Runtime, make_model: MakeModel) -> None:
    model_id = make_model().id
    record = build(runtime, model_id)
    assert (record.status, record.revision, record.attempts) == ("ready", 1, 1)
    assert record.ready_at is not None
    assert record.measured is not None
    assert 0.9 < record.measured.memory_bytes / record.plan.predicted.memory_bytes <= 1
    assert record.measured.process_memory_bytes > record.measured.memory_bytes
    assert 0 < record.measured.latency_seconds <= record.measured.latency_p95_seconds
    assert record.over_budget == []
    order = ["queued", "assembling", "retraining", "verifying", "ready"]
    assert list(dict.fromkeys(statuses(runtime, model_id))) == order
    assert not runtime.repository.models.leased(model_id)


def test_random_weights_are_only_measured(runtime: Runtime, families_dir: Path) -> None:
    file = families_dir / "tiny" / "family.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({**told, "licence": RANDOM}))
    begun = Runtime.start(runtime.settings)
    keep_profile(begun.repository, made_up_profile(begun.family("tiny")))
    asked = queued_model(device_class=begun.device_class, depth=2, rank=8)
    record = build(begun, begun.repository.models.create(asked).id, retrain=None)
    assert (record.status, record.training.stopped) == ("ready", "random")
    assert record.measured is not None


def test_a_prepared_size_is_only_measured(runtime: Runtime, families_dir: Path) -> None:
    family = runtime.family("tiny")
    manifest = family.manifest.model_dump(exclude={"schema_version", "sha256"})
    manifest["layer_order"] = (0, 1, 2, 3)
    parts = (family.genes, family.stem, family.depths, family.limited_data)
    save_family(families_dir / "tiny", manifest, *parts)
    write_quality(families_dir / "tiny", quality_table(SIZES))
    begun = Runtime.start(runtime.settings)
    keep_profile(begun.repository, made_up_profile(begun.family("tiny")))
    full = begun.repository.models.create(
        queued_model(device_class=begun.device_class, depth=4, rank=48)
    ).id
    record = build(begun, full, retrain=None)
    assert (record.status, record.revision) == ("ready", 1)
    order = ["queued", "assembling", "verifying", "ready"]
    assert list(dict.fromkeys(statuses(begun, full))) == order
    less = begun.repository.models.create(
        queued_model(device_class=begun.device_class, depth=4, rank=24)
    ).id
    assert build(begun, less).status == "ready"
    assert "retraining" in statuses(begun, less)
    few = begun.repository.models.create(
        queued_model(device_class=begun.device_class, depth=4, rank=48, dtype="int4")
    ).id
    how: list[object] = []

    def retrain_and_look(*args: Any, **more: Any) -> object:
        how.extend((more["mode"], more["dtype"]))
        return retrain(*args, **more)

    assert build(begun, few, retrain=retrain_and_look).status == "ready"
    assert "retraining" in statuses(begun, few), "four bits were not healed"
    assert how == [begun.repository.models.get(few).plan.mode, DType.INT4]


def test_imported_layers_are_left_out_and_trained(runtime: Runtime, families_dir: Path) -> None:
    family = runtime.family("tiny")
    manifest = family.manifest.model_dump(exclude={"schema_version", "sha256"})
    manifest["imported_order"] = (2, 1, 3, 0)
    layers = DenseLayers.of(materialised(family.genes, family.scales))
    parts = (family.genes, family.stem, family.depths, family.limited_data)
    save_family(families_dir / "tiny", manifest, *parts, imported=layers)
    ratios = {DType.FLOAT32: 1.0, DType.INT4: 1.1}
    losses = {"imported": {2: 0.3, 4: 0.2}, "imported_loss_ratios": ratios}
    write_quality(families_dir / "tiny", quality_table(SIZES, **losses))
    settings = runtime.settings.model_copy(update={"retraining_max_seconds": 0.1})
    begun = Runtime.start(settings)
    profile = made_up_profile(begun.family("tiny"))
    keep_profile(begun.repository, with_imported(profile))

    def made(**fixed: object) -> ModelRecord:
        model = queued_model(device_class=begun.device_class, mode="dense", **fixed)
        return build(begun, begun.repository.models.create(model).id)

    full = made(depth=4, dtype="float32")
    assert (full.status, full.plan.mode, full.plan.rank) == ("ready", Mode.DENSE, 32)
    assert "retraining" not in statuses(begun, full.id)
    own = load_own(begun.store, begun.family("tiny"), served_name(full))
    assert isinstance(own, DenseLayers)
    torch.testing.assert_close(own.stacked(), layers.stacked())
    half = made(depth=2, dtype="float32")
    assert "retraining" in statuses(begun, half.id)
    fewer = load_own(begun.store, begun.family("tiny"), served_name(half))
    assert isinstance(fewer, DenseLayers)
    left = layers.subset((0, 3))
    assert (fewer.weight[Kind.QKV] - left.weight[Kind.QKV]).abs().max() < 0.1
    assert not torch.equal(fewer.weight[Kind.QKV], left.weight[Kind.QKV])
    four_bits = made(depth=4, dtype="int4")
    assert "retraining" in statuses(begun, four_bits.id)
    assert four_bits.measured is not None
    assert full.measured is not None
    assert four_bits.measured.memory_bytes < full.measured.memory_bytes


def test_revision_zero_is_published_before_retraining(
    runtime: Runtime, make_model: MakeModel
) -> None:
    model_id = make_model().id
    seen = []

    def retrain_and_look(*args: Any, **more: Any) -> object:
        record = runtime.repository.models.get(model_id)
        seen.append((record.status, record.revision, record.servable))
        return retrain(*args, **more)

    build(runtime, model_id, retrain=retrain_and_look)
    assert seen == [(ModelStatus.RETRAINING, 0, True)]
    family = runtime.family("tiny")
    first, second = (
        load_own(runtime.store, family, revision_name(runtime.store, model_id, i)).stacked()
        for i in (0, 1)
    )
    assert any((first[name] != second[name]).any() for name in first)


def test_a_model_is_built_once(runtime: Runtime, make_model: MakeModel) -> None:
    model_id = make_model().id
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(build, [runtime] * 3, [model_id] * 3))
    assert build(runtime, model_id).attempts == 1
    assert statuses(runtime, model_id).count("ready") == 1


def test_a_cancelled_build_stops_between_steps(runtime: Runtime, make_model: MakeModel) -> None:
    model_id = make_model().id
    runtime.progress_seconds = 0
    runtime.settings.retraining_steps = 10**6
    thread = threading.Thread(target=build, args=(runtime, model_id))
    thread.start()
    models = runtime.repository.models
    while models.get(model_id).status != "retraining":
        pass
    models.change(model_id, status="cancelled")
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert models.get(model_id).status == "cancelled"


def test_a_model_deleted_while_it_is_built_leaves_nothing(
    runtime: Runtime, make_model: MakeModel
) -> None:
    model_id = make_model().id
    models = runtime.repository.models

    def delete_and_verify(*args: Any) -> object:
        models.change(model_id, status="deleted")
        return verify_here(*args)

    assert build(runtime, model_id, verify=delete_and_verify).status == "deleted"
    assert not (runtime.settings.resolved_store_dir / "models" / model_id).exists()


def test_a_budget_that_this_device_cannot_keep_fails_the_model(
    runtime: Runtime, make_model: MakeModel
) -> None:
    record = build(runtime, make_model(max_mem_gb=1e-6).id)
    assert record.status == "failed"
    assert record.error is not None
    assert "no size fits; the nearest (depth 2, rank 8, factored" in record.error
    assert not record.servable


def test_a_family_without_a_quality_table_fails_the_model(
    runtime: Runtime, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = dataclasses.replace(runtime.family("tiny"), quality=None)
    monkeypatch.setitem(runtime.families, "tiny", family)
    record = build(runtime, make_model().id)
    assert record.error == "Impossible: the family tiny is not calibrated"


def test_a_family_the_worker_does_not_hold_fails_the_model(
    runtime: Runtime, make_model: MakeModel
) -> None:
    error = build(runtime, make_model(family="huge").id).error
    assert error is not None
    assert "no family 'huge'" in error


def test_shutdown_leaves_the_model_to_the_next_worker(
    runtime: Runtime, make_model: MakeModel
) -> None:
    model_id = make_model().id
    runtime.stopping.set()
    record = build(runtime, model_id)
    assert (record.status, record.revision, record.attempts) == ("retraining", 0, 0)
    runtime.stopping.clear()
    record = build(runtime, model_id)
    assert (record.status, record.attempts) == ("ready", 1)


def test_an_absent_redis_does_not_fail_the_model(runtime: Runtime, make_model: MakeModel) -> None:
    model_id = make_model().id

    def outage(*_: object) -> None:
        raise redis.ConnectionError("away")

    with pytest.raises(redis.ConnectionError):
        build(runtime, model_id, verify=outage)
    assert runtime.repository.models.get(model_id).status == "verifying"
    record = build(runtime, model_id)
    assert (record.status, record.attempts) == ("ready", 2)


def test_a_build_is_cancelled_while_it_is_measured(runtime: Runtime, make_model: MakeModel) -> None:
    model_id = make_model().id
    models = runtime.repository.models
    runtime.progress_seconds = 0
    told: list[int] = []

    def cancel_first(*args: Any) -> object:
        models.change(model_id, status="cancelled")
        told.append(1)
        result = verify_here(*args)
        told.append(2)
        return result

    build(runtime, model_id, verify=cancel_first)
    assert told == [1]
    assert models.get(model_id).status == "cancelled"


def test_a_long_wait_is_ended_even_in_a_busy_queue(
    runtime: Runtime, make_model: MakeModel, client: redis.Redis
) -> None:
    lost, other = make_model().id, make_model().id
    runtime.queue.enqueue("fineserve.build", other, runtime.device_class)
    time.sleep(0.06)
    build_housekeeping(runtime, Patience(long_wait_seconds=0.05)).requeue_lost()
    assert lost in enqueued(client, f"build.{runtime.device_class}")


def test_sigma_is_not_used_with_another_version_of_its_family(
    runtime: Runtime, make_model: MakeModel
) -> None:
    model_id = make_model().id
    build(runtime, model_id)
    family = runtime.family("tiny")
    hashes = {**family.manifest.sha256, "learngenes.safetensors": "0" * 64}
    manifest = family.manifest.model_copy(update={"sha256": hashes})
    newer = dataclasses.replace(family, manifest=manifest)
    with pytest.raises(ArtifactError, match="another version of the family tiny"):
        load_own(runtime.store, newer, revision_name(runtime.store, model_id, 1))


def test_lost_work_is_enqueued_again(
    runtime: Runtime, make_model: MakeModel, client: redis.Redis
) -> None:
    models = runtime.repository.models
    dead, alive, waiting = (make_model().id for _ in range(3))
    make_model(device_class="another")
    queue = f"build.{runtime.device_class}"
    models.claim(alive, 3, 60)
    lose(runtime, dead)
    build_housekeeping(runtime).requeue_lost()
    assert enqueued(client, queue) == [dead]
    client.delete(queue)
    time.sleep(0.02)
    models.change(dead, status="cancelled")
    build_housekeeping(runtime, Patience(orphan_seconds=0.01)).requeue_lost()
    assert enqueued(client, queue) == [waiting]
    assert client.keys("build.*") == [queue]


def test_whoever_took_lost_work_may_be_killed_before_it_begins(
    runtime: Runtime, make_model: MakeModel, client: redis.Redis
) -> None:
    lost, queue = make_model().id, f"build.{runtime.device_class}"
    runtime.queue.enqueue("fineserve.build", make_model().id, runtime.device_class)
    lose(runtime, lost)
    keeper = build_housekeeping(runtime, Patience(lost_again_seconds=0.5))
    keeper.requeue_lost()
    keeper.requeue_lost()
    assert enqueued(client, queue).count(lost) == 1
    time.sleep(0.51)
    keeper.requeue_lost()
    assert enqueued(client, queue).count(lost) == 2


def test_lost_work_does_not_flood_the_queue(
    runtime: Runtime, make_model: MakeModel, client: redis.Redis
) -> None:
    queue, dead = f"build.{runtime.device_class}", [make_model().id for _ in range(5)]
    lose(runtime, *dead)
    keeper = build_housekeeping(runtime, Patience(most_requeued=3))
    keeper.requeue_lost()
    assert sorted(enqueued(client, queue)) == sorted(dead[:3])
    for _ in range(3):
        keeper.requeue_lost()
    assert sorted(enqueued(client, queue)) == sorted(dead)
    lose(runtime, dead[0])  # again: it is enqueued at once
    keeper.requeue_lost()
    assert enqueued(client, queue).count(dead[0]) == 2


def stopped_in_the_middle(runtime: Runtime, model_id: str) -> None:
    """A build that is shut down after its second step."""

    def shut_down(*arguments: Any, **more: Any) -> object:
        family, scales, config, tell = arguments

        def told(progress: Progress) -> None:
            if progress.step == 2:
                runtime.stopping.set()
            tell(progress)

        return retrain(family, scales, config, told, **more)

    runtime.progress_seconds = 0
    build(runtime, model_id, retrain=shut_down)
    runtime.stopping.clear()
    assert runtime.repository.models.get(model_id).status == "retraining"


def test_retraining_goes_on_from_its_checkpoint(runtime: Runtime, make_model: MakeModel) -> None:
    model_id = make_model().id
    stopped_in_the_middle(runtime, model_id)
    assert build(runtime, model_id).status == "ready"
    steps = [event["step"] for event in told(runtime, model_id, "progress")]
    assert steps == [1, 3, 4]  # the second was done, and not told
    assert not [*(runtime.store.root / "models" / model_id).glob("checkpoint-*")]


def test_another_host_goes_on_from_it(
    runtime: Runtime, make_model: MakeModel, tmp_path: Path
) -> None:
    bucket, model_id = MemoryStore(), make_model().id
    runtime.store = ObjectStore(bucket, tmp_path / "here", 10**6)
    stopped_in_the_middle(runtime, model_id)
    runtime.store = ObjectStore(bucket, tmp_path / "there", 10**6)
    assert build(runtime, model_id).status == "ready"
    assert [event["step"] for event in told(runtime, model_id, "progress")] == [1, 3, 4]
    paths = [each["path"] for chunk in obstore.list(bucket) for each in chunk]
    assert not [path for path in paths if "checkpoint" in path]


def test_a_corrupt_revision_is_noticed(runtime: Runtime, make_model: MakeModel) -> None:
    model_id = make_model().id
    build(runtime, model_id)
    name = revision_name(runtime.store, model_id, 1)
    path = runtime.store.root / name / OWN_FILE
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ArtifactError, match="corrupt"):
        load_own(runtime.store, runtime.family("tiny"), name)
