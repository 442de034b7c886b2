import asyncio
import json
from pathlib import Path

from fineserve.wire import Snapshot
from registry.keys import Keys, Scope
from registry.settings import Settings
from service.access import Caller
from service.deps import State
from service.status import Snapshots
from tests.service.conftest import Stack


def test_snapshots_come_when_something_has_changed(stack: Stack) -> None:
    snapshots = Snapshots(stack.state, seconds=0.01)

    async def two() -> list[Snapshot]:
        told = snapshots.watch(Caller("", None))
        before = await anext(told)
        await asyncio.to_thread(stack.make_model)
        return [Snapshot.model_validate_json(text) for text in (before, await anext(told))]

    before, after = asyncio.run(two())
    assert [len(snapshot.models) for snapshot in (before, after)] == [0, 1]
    assert after.status is not None
    assert after.status.active_models == 1


def test_a_revoked_key_hears_no_more(stack: Stack, settings: Settings) -> None:
    snapshots = Snapshots(stack.state, seconds=0.01)
    keys = Keys(settings.resolved_keys_file)
    key, _ = keys.create("owner", [Scope.GENERATE])

    async def heard() -> int:
        told = 0
        async for _ in snapshots.watch(Caller("owner", key)):
            told += 1
            await asyncio.to_thread(keys.revoke, key.id)
        return told

    assert asyncio.run(heard()) == 1


def test_images_are_counted_for_each_model_until_it_is_deleted(stack: Stack) -> None:
    repository = stack.runtime.repository
    model, other = stack.ready_model(), stack.ready_model()
    for n in (2, 3):
        stack.sampler.generate(stack.queue(model, n=n))
    assert repository.images_made([other, model]) == {model: 5}
    repository.models.change(other, status="deleted")
    repository.models.change(model, status="deleted")
    assert repository.images_made([model]) == {}


def test_everybody_is_shown_what_is_theirs(stack: Stack, settings: Settings) -> None:
    """One look serves both keys of an owner, without what operators alone are told."""
    keys, mine = Keys(settings.resolved_keys_file), stack.make_model()
    stack.runtime.repository.models.change(mine, status="failed", error="secret")
    snapshots = Snapshots(stack.state, seconds=60)

    async def first(owner: str, scope: Scope) -> Snapshot:
        key, _ = keys.create(owner, [scope])
        return Snapshot.model_validate_json(await anext(snapshots.watch(Caller(owner, key))))

    async def everybody() -> list[Snapshot]:
        callers = [("other", Scope.DEPLOY), ("other", Scope.GENERATE), ("operator", Scope.ADMIN)]
        return [await first(*caller) for caller in callers]

    told = asyncio.run(everybody())
    assert [len(snapshot.models) for snapshot in told] == [0, 0, 1]
    statuses = [snapshot.status for snapshot in told if snapshot.status is not None]
    assert [len(status.failures) for status in statuses] == [0, 0, 1]
    scopes = [status.caller.scopes for status in statuses if status.caller is not None]
    assert scopes == [("deploy",), ("generate",), ("admin",)]


def test_viewers_are_told_that_redis_is_away(tmp_path: Path) -> None:
    state = State(Settings(redis_url=f"unix://{tmp_path}/none.sock", var_dir=tmp_path))

    async def first() -> str:
        return await anext(Snapshots(state).watch(Caller("", None)))

    assert json.loads(asyncio.run(first())) == {"status": None, "models": [], "images": {}}
