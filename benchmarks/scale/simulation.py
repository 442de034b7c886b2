"""A plan past these machines: hosts, Redis and a bucket in simulated time.

What a step, a request and a load cost was measured on one host (`constants`); what is queued,
taken and stepped follows the worker's own rules. SimPy keeps the time.
"""

import json
import math
import random
from collections import OrderedDict
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import simpy

from benchmarks.parts import RESULTS, Figures
from worker.sampling.room import LEAST

Process = Generator[simpy.Event, Any, None]
QUANTUM_STEPS = 8
"""Steps after which an engine looks who waits."""
HOSTS = (1, 2, 5, 10, 20, 50, 100, 200, 400)
MODELS = 10_000
RESIDENT = 500
"""Models that a host holds."""
LOAD = 0.7
IDLE = 0.2
"""Share of what a host could do without loads at which the share of loads is found."""
SIMULATED_SECONDS = 20.0
REGION_HOSTS, REGION_SECONDS, LOST_AT, BACK_AT = 20, 240, 30, 90


@dataclass(frozen=True)
class Costs:
    """Seconds, of one core where nothing else is said."""

    rows: Sequence[float]
    step_seconds: Sequence[float]
    full_rows: int
    steps: int
    worker_seconds: float
    """Of a request, beside its steps, on the host that samples it."""
    api_seconds: float
    shared_seconds: float
    """Of Redis, of the bucket and of who asks, on a core of either host where they have none."""
    redis_seconds: float
    load_seconds: float
    """Of a model that is not resident."""

    def step(self, rows: float) -> float:
        if rows > self.rows[-1]:
            return self.step_seconds[-1] * rows / self.rows[-1]
        return float(np.interp(rows, self.rows, self.step_seconds))


@dataclass(eq=False)
class Request:
    arrived: float
    model: int
    done: simpy.Event
    left: int


@dataclass
class Host:
    """A worker with its engine, on one core."""

    env: simpy.Environment
    costs: Costs
    queue: simpy.Store
    resident_models: int
    alone: bool
    taken: list[Request] = field(default_factory=list)
    resident: "OrderedDict[int, None]" = field(default_factory=OrderedDict)
    owed: float = 0.0
    """Seconds of its core that are not steps and have not been spent yet."""
    alive: bool = True
    cold: int = 0

    def take(self) -> Process:
        """Take requests as `worker.sampling.room` lets it."""
        while self.alive:
            running = min(len(self.taken), self.costs.full_rows)
            if self.alone or len(self.taken) < max(LEAST, 2 * running):
                request = yield self.queue.get()
                if not self.alive:
                    self.queue.items.insert(0, request)
                    return
                if request.model not in self.resident:
                    self.cold += 1
                    self.owed += self.costs.load_seconds
                self.resident[request.model] = None
                self.resident.move_to_end(request.model)
                while len(self.resident) > self.resident_models:
                    self.resident.popitem(last=False)
                self.taken.append(request)
            else:
                yield self.env.timeout(0.005)

    def engine(self) -> Process:
        while self.alive:
            if not self.taken:
                yield self.env.timeout(0.002)
                continue
            batch = self.taken[: self.costs.full_rows]
            steps = min(QUANTUM_STEPS, *(request.left for request in batch))
            owed, self.owed = self.owed, 0.0
            yield self.env.timeout(steps * self.costs.step(len(batch)) + owed)
            for request in batch:
                request.left -= steps
                if request.left <= 0 and self.alive:
                    self.taken.remove(request)
                    self.owed += self.costs.worker_seconds
                    request.done.succeed()


@dataclass
class World:
    """So many hosts over one Redis and one bucket."""

    costs: Costs
    hosts: int
    resident_models: int = 10**6
    shared_cores: bool = False
    """Whether API, Redis, bucket and clients use the hosts' own cores, as on one machine."""
    latencies: list[float] = field(default_factory=list)
    done: int = 0

    def __post_init__(self) -> None:
        self.env = simpy.Environment()
        self.queue = simpy.Store(self.env)
        self.redis = simpy.Resource(self.env, capacity=1)  # it has one thread
        self.all = [
            Host(self.env, self.costs, self.queue, self.resident_models, self.hosts == 1)
            for _ in range(self.hosts)
        ]
        for host in self.all:
            self.env.process(host.take())
            self.env.process(host.engine())

    def ask(self, model: int, host: int = 0) -> Generator[simpy.Event, Any, float]:
        """One request to its end; gives its seconds."""
        arrived = self.env.now
        api = self.costs.api_seconds
        if self.shared_cores:
            self.all[host % self.hosts].owed += api + self.costs.shared_seconds
        else:
            yield self.env.timeout(api)  # APIs grow with the hosts
            with self.redis.request() as turn:
                yield turn
                yield self.env.timeout(self.costs.redis_seconds)
        request = Request(arrived, model, self.env.event(), self.costs.steps)
        yield self.queue.put(request)
        yield request.done
        self.done += 1
        self.latencies.append(self.env.now - arrived)
        return self.env.now - arrived

    def closed(self, clients: int) -> None:
        def client(number: int) -> Process:
            while True:
                yield from self.ask(0, number)

        for number in range(clients):
            self.env.process(client(number))

    def open(self, rate: float, models: int, seed: int = 0, zipf: float = 1.0) -> None:
        """Poisson arrivals, of models whose demand falls as Zipf says."""
        chance = random.Random(seed)
        weights = np.cumsum(1 / np.arange(1, models + 1) ** zipf)
        weights /= weights[-1]

        def arrivals() -> Process:
            while True:
                yield self.env.timeout(chance.expovariate(rate))
                model = int(np.searchsorted(weights, chance.random()))
                self.env.process(self.ask(model, chance.randrange(self.hosts)))

        self.env.process(arrivals())

    def run(self, seconds: float, warmup: float) -> tuple[float, float]:
        """Requests a second, and the 95th percentile of their seconds, after the warm-up."""
        self.env.run(warmup)
        self.latencies.clear()
        before = self.done
        self.env.run(warmup + seconds)
        rate = (self.done - before) / seconds
        return rate, float(np.quantile(self.latencies, 0.95)) if self.latencies else math.inf


def costs_of(constants: Figures) -> Costs:
    """Costs by what one host has measured, so that the simulation of it gives its own rate."""
    cpu = constants["cpu_seconds_a_request"]
    rows, seconds = constants["step_rows"], constants["step_seconds"]
    full = constants["full_rows"]
    a_step = float(np.interp(full, rows, seconds))
    stepping = constants["steps"] * a_step / full
    beside = max(0.0, 1 / constants["images_per_second"] - stepping - cpu["api"])
    return Costs(
        rows=rows,
        step_seconds=seconds,
        full_rows=full,
        steps=constants["steps"],
        worker_seconds=beside,
        api_seconds=cpu["api"],
        shared_seconds=0.0,
        redis_seconds=cpu["redis"],
        load_seconds=constants["cold_load_seconds"],
    )


def _known() -> Figures:
    parts: Figures = json.loads((RESULTS / "scale.json").read_text())["parts"]
    return parts


def prediction() -> Figures:
    """What two hosts of one core each will do, by what one has shown; said before they are tried.

    Where Redis, bucket and clients had a core of their own beside one host, they now have none. By
    as much as one host differs from its simulation, two are taken to differ from theirs.
    """
    constants = _known()["constants"]
    costs, clients = costs_of(constants), constants["clients"]
    cpu = constants["cpu_seconds_a_request"]
    one = World(costs, 1, shared_cores=True)
    one.closed(clients)
    rate, p95 = one.run(60, 10)
    beside = cpu["redis"] + cpu["bucket"] + cpu["clients"]
    two = World(replace(costs, shared_seconds=beside), 2, shared_cores=True)
    two.closed(2 * clients)
    rate_two, p95_two = two.run(60, 10)
    return {
        "one_simulated": {"images_per_second": rate, "latency_p95": p95},
        "one_measured": {
            "images_per_second": constants["images_per_second"],
            "latency_p95": constants["latency_p95"],
        },
        "images_per_second": rate_two * constants["images_per_second"] / rate,
        "latency_p95": p95_two * constants["latency_p95"] / p95,
    }


def beyond() -> Figures:
    """Hundreds of hosts and ten thousand models at seven tenths of what the hosts could do; then
    half of twenty hosts lost for a minute."""
    constants = _known()["constants"]
    costs = costs_of(constants)
    each = _requests_a_second(costs)
    listed = constants["listed_worker_seconds"]
    rows = []
    for hosts in HOSTS:
        redis = costs.redis_seconds + hosts * listed["redis"]
        api = costs.api_seconds + hosts * listed["api"]
        world = World(
            replace(costs, redis_seconds=redis, api_seconds=api), hosts, resident_models=RESIDENT
        )
        offered = LOAD * hosts * each
        world.open(offered, MODELS)
        rate, p95 = world.run(SIMULATED_SECONDS, SIMULATED_SECONDS / 2)
        rows.append(
            {
                "hosts": hosts,
                "offered_a_second": offered,
                "images_a_second": rate,
                "latency_p95": p95,
                "redis_busy": offered * redis,
                "api_cores": offered * api,
                "cold_share": sum(host.cold for host in world.all) / max(1, world.done),
                "host_seconds_an_image": hosts / rate,
            }
        )
    most = [row for row in rows if row["images_a_second"] > 0.95 * row["offered_a_second"]]
    return {
        "hosts": rows,
        "models": MODELS,
        "load": LOAD,
        "simulated_hosts": max((row["hosts"] for row in most), default=0),
        "saturates_first": "Redis" if any(row["redis_busy"] > 1 for row in rows) else "nothing",
        "lost_region": _lost_region(costs, each),
    }


def _requests_a_second(costs: Costs) -> float:
    """What one host can do of this demand, loads of models among it."""
    warm = costs.worker_seconds + costs.steps * costs.step(costs.full_rows) / costs.full_rows
    idle = World(costs, 1, resident_models=RESIDENT)
    idle.open(IDLE / warm, MODELS)
    idle.run(SIMULATED_SECONDS / IDLE, 1)
    return 1 / (warm + idle.all[0].cold / idle.done * costs.load_seconds)


def _lost_region(costs: Costs, each: float) -> Figures:
    """95th percentile in each second, as half of the hosts go and come back."""
    world = World(costs, REGION_HOSTS, resident_models=RESIDENT)
    world.open(LOAD * REGION_HOSTS * each, MODELS)
    seconds: list[float] = []
    for second in range(REGION_SECONDS):
        if second == LOST_AT:
            for host in world.all[: REGION_HOSTS // 2]:
                host.alive = False
                world.queue.items[:0] = host.taken  # what it had is taken up again
                for request in host.taken:
                    request.left = costs.steps
                host.taken = []
        if second == BACK_AT:
            for host in world.all[: REGION_HOSTS // 2]:
                host.alive = True
                world.env.process(host.take())
                world.env.process(host.engine())
        world.latencies.clear()
        world.env.run(second + 1)
        seconds.append(float(np.quantile(world.latencies, 0.95)) if world.latencies else math.nan)
    usual = float(np.nanmedian(seconds[5:LOST_AT]))
    late = [second for second, p95 in enumerate(seconds) if p95 > 2 * usual and second >= BACK_AT]
    return {
        "hosts": REGION_HOSTS,
        "lost_at": LOST_AT,
        "back_at": BACK_AT,
        "latency_p95": [round(each, 3) for each in seconds],
        "usual_after_seconds": max(late, default=BACK_AT) - BACK_AT,
    }
