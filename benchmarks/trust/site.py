"""What the parts have in common: families to serve, and load that keeps account."""

import base64
import contextlib
import io
import itertools
import json
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import httpx
import redis
from PIL import Image

from benchmarks.deployment import FAMILIES, Deployment, wait
from benchmarks.parts import REPOSITORY, Figures
from registry.store import MANIFEST, DirectoryStore

FASHION = REPOSITORY / "var" / "trust" / "families"
"""The shipped family `fashion` alone: a worker starts in seconds."""
GENERATION = {"n": 4, "num_inference_steps": 10}
LATER_SECONDS = 4.0
"""Pause between requests that are not waited for: a load that can be done, faults included."""
GOOD = {"ready", "done"}
EVENTS_READ_EVERY_SECONDS = 60.0
PATIENCE_SECONDS = 900.0
"""How long what was accepted may take once the faults are over."""


def link_families() -> None:
    FASHION.mkdir(parents=True, exist_ok=True)
    link = FASHION / "fashion"
    if not link.exists():
        link.symlink_to(FAMILIES / "fashion")


@dataclass
class Account:
    """What was accepted, and how the service answered."""

    models: dict[str, str] = field(default_factory=dict)
    """Id by Idempotency-Key."""
    generations: dict[str, str] = field(default_factory=dict)
    contradictions: list[str] = field(default_factory=list)
    """Keys that got two ids."""
    answers: Counter[str] = field(default_factory=Counter)
    """Number of answers by status, or by kind of error."""
    told: dict[str, str] = field(default_factory=dict)
    """What the last refusal of each status said."""
    slowest_refusal_seconds: float = 0.0
    finished_at: list[float] = field(default_factory=list)
    """Moments (monotonic) at which generations that were waited for ended."""
    answered_at: list[float] = field(default_factory=list)
    """Moments at which /plan, asked ten times a second, answered."""
    ends: dict[str, set[str]] = field(default_factory=dict)
    """Events that say that a record ended well, by record."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def accept(self, kind: str, key: str, record_id: str) -> None:
        with self._lock:
            ids = getattr(self, kind)
            if ids.setdefault(key, record_id) != record_id:
                self.contradictions.append(key)

    def count(self, answer: str, told: str = "", seconds: float = 0.0) -> None:
        with self._lock:
            self.answers[answer] += 1
            if told:
                self.told[answer] = told
                self.slowest_refusal_seconds = max(self.slowest_refusal_seconds, seconds)

    def read_ends(self, client: redis.Redis) -> None:
        """Read all event streams that Redis has: they expire a while after the end."""
        for stream in client.scan_iter("fineserve:*:events", count=1000):
            record_id = stream.split(":")[2]
            for event_id, fields in cast(list[Any], client.xrange(stream)):
                if fields["event"] == "status" and json.loads(fields["data"])["status"] in GOOD:
                    self.ends.setdefault(record_id, set()).add(event_id)

    @property
    def answered_5xx(self) -> int:
        return sum(n for status, n in self.answers.items() if status.startswith("5"))


class Load:
    """Clients that ask again, with the same Idempotency-Key, until they are answered."""

    def __init__(self, deployment: Deployment, models: list[str], account: Account) -> None:
        self._deployment, self._models, self._account = deployment, models, account
        for model in models:
            account.accept("models", model, model)
        self._ending = threading.Event()
        self._chance = random.Random(0)
        sizes = deployment.http.get("/families").json()["families"][0]["sizes"]
        self._sizes = [*itertools.product(sizes["depths"][:3], sizes["ranks"][:3])]

    @contextlib.contextmanager
    def running(self, samplers: int = 2, model_seconds: float = 60.0) -> Iterator[None]:
        """`samplers` wait for their images, one more does not; a model every `model_seconds`."""
        work: list[Callable[[httpx.Client], None]] = [self._sample] * samplers
        work += [self._sample_later, self._probe, self._read_ends]
        work.append(lambda http: self._build(http, model_seconds))
        threads = [threading.Thread(target=self._repeat, args=(w,), daemon=True) for w in work]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ending.set()
            for thread in threads:
                thread.join(timeout=PATIENCE_SECONDS)

    def _repeat(self, work: Callable[[httpx.Client], None]) -> None:
        with httpx.Client(base_url=self._deployment.url, timeout=120, trust_env=False) as http:
            while not self._ending.is_set():
                work(http)

    def _sample(self, http: httpx.Client) -> None:
        answer = self._insist(http, "/generate", self._generation(), {})
        if answer is not None:
            self._account.finished_at.append(time.monotonic())

    def _sample_later(self, http: httpx.Client) -> None:
        self._insist(http, "/generate", self._generation(), {"Prefer": "respond-async"})
        self._ending.wait(LATER_SECONDS)

    def _build(self, http: httpx.Client, every_seconds: float) -> None:
        depth, rank = self._chance.choice(self._sizes)
        body = {"max_mem_gb": 4, "depth": depth, "rank": rank}
        self._insist(http, "/models", body, {})
        self._ending.wait(every_seconds)

    def _probe(self, http: httpx.Client) -> None:
        try:
            if http.post("/plan", json={"max_mem_gb": 4}, timeout=2).status_code == 200:
                self._account.answered_at.append(time.monotonic())
        except httpx.HTTPError:
            pass
        self._ending.wait(0.1)

    def _read_ends(self, _: httpx.Client) -> None:
        with contextlib.suppress(redis.RedisError), self._deployment.redis() as client:
            self._account.read_ends(client)
        self._ending.wait(EVENTS_READ_EVERY_SECONDS)

    def _generation(self) -> dict[str, Any]:
        return {"model": self._chance.choice(self._models), **GENERATION}

    def _insist(
        self, http: httpx.Client, path: str, body: dict[str, Any], headers: dict[str, str]
    ) -> httpx.Response | None:
        """The answer that accepts it; None when the end came first and nothing was accepted."""
        key = uuid.uuid4().hex
        kind = {"/models": "models", "/generate": "generations"}[path]
        while True:
            asked = time.monotonic()
            try:
                answer = http.post(path, json=body, headers={"Idempotency-Key": key, **headers})
            except httpx.HTTPError as error:
                self._account.count(type(error).__name__)
                pause_seconds = 0.5
            else:
                status = str(answer.status_code)
                if answer.is_success:
                    self._account.count(status)
                    self._account.accept(kind, key, answer.json()["id"])
                    return answer
                self._account.count(status, answer.text[:300], time.monotonic() - asked)
                pause_seconds = float(answer.headers.get("Retry-After", "1"))
            if self._ending.wait(min(pause_seconds, 5.0)):
                return None


def settle(
    deployment: Deployment, account: Account, broken: Callable[[], list[str]] | None = None
) -> Figures:
    """What became of everything that was accepted, once the faults are over.

    `broken` gives what is corrupt in the store, by default the directory of the deployment.

    Lost is what does not end as it should within PATIENCE_SECONDS.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    broken = broken or (lambda: corrupt(DirectoryStore(deployment.var / "store")))

    def outcome(path: str, good: str) -> str:
        def ended() -> str | None:
            try:
                record = deployment.http.get(path, headers={"accept": "application/json"})
            except httpx.HTTPError:
                return None
            if record.status_code in (404, 410):
                return f"{record.status_code}"
            if record.status_code != 200:
                return None
            status = str(record.json()["status"])
            if status == "failed":
                return f"failed: {record.json()['error']}"
            if status != good:
                return "cancelled" if status == "cancelled" else None
            return good if good == "ready" or _whole(record.json()) else "images are not whole"

        try:
            return wait(ended, max(1.0, deadline - time.monotonic()))
        except TimeoutError:
            return "unfinished"

    models = {i: outcome(f"/models/{i}", "ready") for i in account.models.values()}
    generations = {i: outcome(f"/generations/{i}", "done") for i in account.generations.values()}
    with deployment.redis() as client:
        account.read_ends(client)
    outcomes = {**models, **generations}
    ends = {i: len(account.ends.get(i, ())) for i in outcomes}
    lost = {i: outcome for i, outcome in outcomes.items() if outcome not in GOOD}
    twice = [i for i, times in ends.items() if times > 1]
    unasked = sorted({model.id for model in deployment.client.models()} - set(models))
    return {
        "accepted": len(models) + len(generations),
        "accepted_models": len(models),
        "accepted_generations": len(generations),
        "lost": len(lost),
        "lost_why": dict(list(lost.items())[:20]),
        "duplicated": len(twice) + len(account.contradictions),
        "ends_not_seen": len([i for i, times in ends.items() if not times and i not in lost]),
        "models_nobody_was_told_of": unasked,
        "corrupt": len(broken()),
        "answers": dict(account.answers),
        "told": account.told,
        "slowest_refusal_seconds": round(account.slowest_refusal_seconds, 1),
        "answered_5xx": account.answered_5xx,
        "longest_without_an_answer_seconds": _longest(account.answered_at),
        "longest_without_an_image_seconds": _longest(account.finished_at),
    }


def _whole(generation: dict[str, Any]) -> bool:
    """Whether all of its images can be decoded."""
    images = generation["images"]
    for image in images:
        Image.open(io.BytesIO(base64.b64decode(image["b64_png"]))).load()
    return len(images) == GENERATION["n"]


def corrupt(store: DirectoryStore) -> list[str]:
    """Artifacts that are visible and not whole."""
    bad = []
    for manifest in store.root.rglob(MANIFEST):
        name = str(manifest.parent.relative_to(store.root))
        if name.startswith("incoming"):
            continue
        try:
            for file in json.loads(manifest.read_text())["sha256"]:
                store.read(name, file)
        except Exception as error:
            bad.append(f"{name}: {error}")
    return bad


def _longest(moments: list[float]) -> float | None:
    gaps = [later - earlier for earlier, later in itertools.pairwise(sorted(moments))]
    return round(max(gaps), 1) if gaps else None
