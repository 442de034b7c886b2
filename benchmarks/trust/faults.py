"""Processes killed under load, and what they need taken away, for real."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from benchmarks.deployment import Deployment, wait
from benchmarks.parts import REPOSITORY, Figures, say
from benchmarks.trust import hostile
from benchmarks.trust.site import FASHION, Account, Load, settle
from fineserve.embedded import valkey_command

KILLS = 100
VICTIMS = {
    "valkey": "valkey-server",
    "api": "-m service",
    "build-worker": "-m worker build",
    "sample-worker": "-m worker sample",
}
ATTEMPTS = 30
"""Attempts; by default three, so that a request that kills its worker ends: here only we kill."""
RECOVERY_SECONDS = 300.0
SLOW_RECOVERY_SECONDS = 60.0
SLOW = REPOSITORY / "var" / "trust" / "slow"
"""Logs of kills after which it took that long."""
OUTAGE_SECONDS = 30.0
SPARE_BYTES = 1_000_000
CLOCK_JUMP_SECONDS = 3600.0
SETTINGS: dict[str, object] = {"profile_seconds": 5, "verify_seconds": 2, "max_attempts": ATTEMPTS}


def kills(number: int = KILLS, families: Path = FASHION, *, attacked: bool = True) -> Figures:
    """SIGKILL to one of four at random, when all are well again after the last one; hostile clients
    are there all the time, if it is to be `attacked`.
    """
    chance, account = random.Random(0), Account()
    killed = dict.fromkeys(VICTIMS, 0)
    recoveries = []
    with Deployment(families, **SETTINGS) as deployment:
        deployment.up()
        load = Load(deployment, [deployment.ready_model()], account)
        beside = hostile.running(deployment) if attacked else contextlib.nullcontext()
        with load.running(), beside:
            for i in range(number):
                time.sleep(chance.uniform(0, 4))
                victim = chance.choice([*VICTIMS])
                for pid in deployment.pids(VICTIMS[victim]):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                killed[victim] += 1
                recoveries.append(_recovery_seconds(deployment))
                if recoveries[-1] > SLOW_RECOVERY_SECONDS:
                    shutil.copytree(deployment.var / "logs", SLOW / f"{i + 1}", dirs_exist_ok=True)
                say(f"{i + 1}: {victim}, well after {recoveries[-1]:.1f} s")
        figures = settle(deployment, account)
    return {
        "kills": number,
        "hostile_clients": len(hostile.ATTACKS) if attacked else 0,
        "killed": killed,
        "max_attempts": ATTEMPTS,
        "longest_recovery_seconds": round(max(recoveries), 1),
        **figures,
    }


def _recovery_seconds(deployment: Deployment) -> float:
    """Seconds until everything runs and is ready. Raises TimeoutError."""
    begun = time.monotonic()

    def well() -> bool:
        states = [line.split()[1] for line in deployment.control("status").splitlines()]
        return states == ["RUNNING"] * len(VICTIMS) and deployment.ready() and _beating(deployment)

    wait(well, RECOVERY_SECONDS)
    return time.monotonic() - begun


def _beating(deployment: Deployment) -> bool:
    """Whether the heartbeats are those of living workers: a dead one's lasts for seconds."""
    alive = {str(pid) for pid in deployment.pids()}
    try:
        workers = deployment.http.get("/status").json()["workers"]
    except httpx.HTTPError:
        return False
    beating = {w["queue"] for w in workers if w["name"].rpartition(":")[2] in alive}
    return beating == {"build", "sample"}


def full_broker_disk(families: Path = FASHION) -> Figures:
    """Valkey's append-only file on a file system of 32 MB that fills up for a while."""
    return _outage(families, lambda deployment: _filled(deployment.var / "valkey", 32))


def full_store_disk(families: Path = FASHION) -> Figures:
    """The artifacts on one of 64 MB; without the guard that refuses in time."""
    settings = {"min_free_disk_gb": 0}
    return _outage(families, lambda deployment: _filled(deployment.var / "store", 64), **settings)


def clock_jump(families: Path = FASHION) -> Figures:
    """This machine's clock an hour ahead, and after a while right again."""

    @contextlib.contextmanager
    def ahead(_: Deployment) -> Iterator[None]:
        _set_clock(CLOCK_JUMP_SECONDS)
        try:
            yield
        finally:
            _set_clock(-CLOCK_JUMP_SECONDS)

    return _outage(families, lambda deployment: contextlib.nullcontext(ahead(deployment)))


def _set_clock(ahead_seconds: float) -> None:
    time.clock_settime(time.CLOCK_REALTIME, time.time() + ahead_seconds)


def killed_for_memory(families: Path = FASHION) -> Figures:
    """The sampling worker in a control group with little room: the kernel kills it."""

    @contextlib.contextmanager
    def cramped(deployment: Deployment) -> Iterator[None]:
        group = Path("/sys/fs/cgroup/memory") / deployment.var.name
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(SPARE_BYTES))
        (pid,) = deployment.pids(VICTIMS["sample-worker"])
        (group / "cgroup.procs").write_text(str(pid))  # what it holds already does not count
        try:
            yield
            wait(lambda: pid not in deployment.pids(VICTIMS["sample-worker"]), RECOVERY_SECONDS)
        finally:
            for left in (group / "cgroup.procs").read_text().split():
                os.kill(int(left), signal.SIGKILL)
            wait(lambda: not (group / "cgroup.procs").read_text(), 10)
            group.rmdir()

    return _outage(families, lambda deployment: contextlib.nullcontext(cramped(deployment)))


def cut_network(families: Path = FASHION) -> Figures:
    """Valkey behind a network of its own, whose cable is pulled: packets vanish."""
    name, inside, outside = "fineserve-trust", "10.231.0.2", "10.231.0.1"
    for command in (
        f"ip netns add {name}",
        f"ip link add fs-outside type veth peer name fs-inside netns {name}",
        f"ip addr add {outside}/30 dev fs-outside",
        "ip link set fs-outside up",
        f"ip -n {name} addr add {inside}/30 dev fs-inside",
        f"ip -n {name} link set fs-inside up",
    ):
        subprocess.run(command.split(), check=True)

    @contextlib.contextmanager
    def pulled(_: Deployment) -> Iterator[None]:
        subprocess.run(["ip", "link", "set", "fs-outside", "down"], check=True)
        try:
            yield
        finally:
            subprocess.run(["ip", "link", "set", "fs-outside", "up"], check=True)

    directory = Path("/tmp/fineserve-trust-valkey")
    directory.mkdir(exist_ok=True)
    valkey = valkey_command(directory / "socket", directory)
    listening = ["--port", "6379", "--bind", inside, "--protected-mode", "no"]
    broker = subprocess.Popen(
        ["ip", "netns", "exec", name, *valkey, *listening], stdout=subprocess.DEVNULL
    )
    try:
        settings = {"redis_url": f"redis://{inside}:6379/0"}
        return _outage(
            families, lambda deployment: contextlib.nullcontext(pulled(deployment)), **settings
        )
    finally:
        broker.kill()
        broker.wait()
        subprocess.run(["ip", "netns", "del", name], check=True)


Trouble = Callable[
    [Deployment], contextlib.AbstractContextManager[contextlib.AbstractContextManager[None]]
]
"""Gives, before the start, what makes the trouble."""


def _outage(families: Path, prepare: Trouble, **settings: object) -> Figures:
    """Under load: half a minute without trouble, as much with it, then until all is well."""
    account = Account()
    with (
        Deployment(families, **SETTINGS, **settings) as deployment,
        prepare(deployment) as trouble,
    ):
        deployment.up()
        with Load(deployment, [deployment.ready_model()], account).running():
            time.sleep(OUTAGE_SECONDS)
            with trouble:
                time.sleep(OUTAGE_SECONDS)
            recovered = _healthy_seconds(deployment)
            time.sleep(OUTAGE_SECONDS)
        figures = settle(deployment, account)
    return {
        "outage_seconds": OUTAGE_SECONDS,
        "recovery_seconds": round(recovered, 1),
        **figures,
    }


def _healthy_seconds(deployment: Deployment) -> float:
    begun = time.monotonic()
    wait(deployment.ready, RECOVERY_SECONDS)
    return time.monotonic() - begun


@contextlib.contextmanager
def _filled(directory: Path, megabytes: int) -> Iterator[contextlib.AbstractContextManager[None]]:
    """A file system of its own at `directory`; gives what fills it."""

    @contextlib.contextmanager
    def full() -> Iterator[None]:
        filling = directory / "filling"
        with contextlib.suppress(OSError), filling.open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)
        try:
            yield
        finally:
            filling.unlink()

    directory.mkdir(parents=True)
    size = f"size={megabytes}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(directory)], check=True)
    try:
        yield full()
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)
