"""All settings of every process, from FINESERVE_* variables."""

import ipaddress
import os
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    ValidationError,
    field_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from registry.address import RedisAddress

PACKAGES = Path(__file__).parent.parent
HOST_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?|\[[0-9a-f:.]+\]")


def found_families(packages: Path = PACKAGES) -> Path:
    """Folder ./families, or where there is none that which was installed with the packages."""
    here, installed = Path("families"), packages / "fineserve" / "families"
    return installed if installed.is_dir() and not here.is_dir() else here


class Settings(BaseSettings):
    """Settings, each a FINESERVE_* variable; docs/settings.md is made of these docstrings."""

    model_config = SettingsConfigDict(
        env_prefix="FINESERVE_",
        env_ignore_empty=True,  # an empty variable is one that is not set
        use_attribute_docstrings=True,
    )

    host: str = "127.0.0.1"
    """Address that the API listens on. Any but a loopback address needs an API key."""
    trusted_network: bool = False
    """Whether `host` may be any address though there are no API keys: where a container's port is
    published to this host alone, or a proxy authenticates whoever comes."""
    allowed_hosts: str = ""
    """Names, separated by commas, that the API answers for besides `localhost` while there are no
    API keys; `*` is any, which lets every web page that is opened on this host call it."""
    port: int = Field(8000, ge=1, le=65535)
    """Port that the API listens on."""

    var_dir: Path = Path("var")
    """Directory of the embedded default's data, logs, API keys and sockets."""
    redis_url: str | None = None
    """Address of a Redis or Valkey of your own, with `appendonly yes` and `noeviction`; by default
    an embedded one in `var_dir`."""
    store_dir: Path | None = None
    """Directory of the artifact store, which the API and all workers share; by default `store` in
    `var_dir`."""
    store_url: str | None = None
    """Bucket of the artifact store in place of `store_dir`, for hosts that share no disk:
    `s3://bucket/folder`, `gs://…`, `az://…`; credentials and endpoint are those of the
    environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, …)."""
    store_cache_gb: PositiveFloat = 10.0
    """Disk space, in 10^9 bytes, in `var_dir`, for what was read from that bucket lately."""
    presigned_downloads: bool = False
    """Whether exports are fetched from that bucket itself, by an address that is good for five
    minutes for whoever has it, rather than through the API."""
    families_dir: Path = Field(default_factory=found_families)
    """Directory of the families that workers load; by default `families`, or those that were
    installed with the package where there is no such folder."""
    default_family: str = "fashion"
    """Family that is meant where a request names none and workers hold several."""

    metrics_port: int | None = Field(None, ge=1, le=65535)
    """Port on which a worker answers Prometheus itself, on a host of its own. Without it the API's
    /metrics tells what workers count, if they count into the same directory
    (PROMETHEUS_MULTIPROC_DIR)."""
    metrics_host: str = "127.0.0.1"
    """Address that a worker answers Prometheus on, at `metrics_port`."""

    api_key: SecretStr | None = None
    """API key that the command line sends to a service that asks for one."""
    keys_file: Path | None = None
    """File of API keys, by their SHA-256; by default `keys.json` in `var_dir`. While there is none,
    and never was one, everybody may do everything."""
    require_keys: bool = False
    """Whether nobody comes in without an API key, even while there is no file of them."""
    session_seconds: PositiveInt = 12 * 3600
    """Seconds after which whoever signed in to the page has to do so again."""
    trusted_proxies: str = ""
    """Addresses, separated by commas, whose X-Forwarded headers tell who the client is."""
    max_active_models: PositiveInt = 200
    """Most models of all owners together that are accepted and not finished; the next is told to
    come back later (429)."""
    max_active_generations: PositiveInt = 2000
    """Most generations of all owners together that are accepted and not finished; the next is told
    to come back later (429)."""

    max_connections: PositiveInt = 2000
    """Most connections of the API at once; the next is told to come back later (503)."""

    min_free_disk_gb: NonNegativeFloat = 0.2
    """Free space, in 10^9 bytes, where the artifacts are: with less nothing new is accepted."""
    max_store_gb: PositiveFloat | None = None
    """Space, in 10^9 bytes, that artifacts may take in all: with more nothing new is accepted."""

    log_format: Literal["json", "console"] = "json"
    """Format of the log: lines of JSON, or text for people."""

    max_upload_mb: PositiveFloat = 256.0
    """Largest size, in 10^6 bytes, of an archive of images."""
    max_unpacked_mb: PositiveFloat = 1024.0
    """Largest size, in 10^6 bytes, of that archive when it is unpacked."""
    upload_processor_seconds: PositiveInt = 120
    """Most seconds of a processor that reading an archive may take."""
    max_task_images: PositiveInt = 20_000
    """Most images of a task."""
    max_task_mb: PositiveFloat = 100.0
    """Largest size, in 10^6 bytes, of a task's images, scaled to what the family takes."""
    max_task_classes: PositiveInt = 1000
    """Most classes of a task."""
    max_tasks: PositiveInt = 50
    """Most tasks of one owner."""

    max_images_per_request: PositiveInt = 128
    """Most images of one generation."""
    max_inference_steps: PositiveInt = 250
    """Most denoising steps of one generation."""
    wait_seconds: PositiveFloat = 300.0
    """Seconds that POST /generate and an export wait for a worker; the former then answers 202."""

    max_concurrent_generations: PositiveInt = 64
    """Most generations that a sampling worker takes from the queue at once; its engine decides
    which of them run."""
    max_batch_rows: PositiveInt = 64
    """Most rows of one step of the engine; a guided image has two."""
    latency_target_ratio: PositiveFloat = 2.0
    """Multiple of its time in a full batch that a generation may take before others have to wait
    for it, if its model has no latency budget."""
    device_mem_gb: PositiveFloat | None = None
    """Memory, in 10^9 bytes, that the sampling engine may hold; by default 90 % of a GPU's, half of
    a CPU's. Too much, and the kernel kills the worker."""
    idle_release_seconds: PositiveFloat | None = None
    """Seconds without a request for a family after which its weights leave the device; the next
    request loads them again, in about a second. By default they stay."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What workers compute on: `auto` takes CUDA where torch can use it; `cuda` ends a worker that
    cannot."""
    cuda_graphs: bool = False
    """Whether a step that stays the same is captured as one CUDA graph; no card has measured it."""
    compile: bool = True
    """Whether a sampling worker has its kernels compiled while it serves without them."""
    kernels_dir: Path | None = None
    """Directory of compiled kernels, which later starts load and all sampling workers of a host
    share; by default `kernels` in `var_dir`. They are code: it is for one user alone."""

    workers_on_demand: bool = False
    """Whether workers may be away while nothing waits, because something starts them by the length
    of their queue: what was known of them then holds for 30 days, the API is ready without them,
    and accepts work for them."""
    max_attempts: PositiveInt = 3
    """Most attempts at one record whose worker died; the last one runs alone."""
    lease_seconds: PositiveFloat = 15.0
    """Seconds without a sign of life after which a worker has lost its task."""
    stuck_seconds: PositiveFloat = 300.0
    """Seconds without progress after which a worker ends itself, for its supervisor to start
    another."""
    visibility_timeout_seconds: PositiveInt = 3600
    """Seconds after which the broker delivers a message again that nobody has acknowledged; longer
    than the longest task, or work is done twice."""
    image_ttl_seconds: PositiveInt = 24 * 3600
    """Seconds until images, exports and the records of generations are deleted."""
    profile_seconds: PositiveFloat = 30.0
    """Seconds, about, for which a worker measures its device for a family that is new to it."""
    verify_seconds: PositiveFloat = 5.0
    """Seconds after which no further batch is timed when a model is verified; three times as many
    where something else uses the device meanwhile."""
    build_nice: Annotated[int, Field(ge=0, le=19)] = 10
    """Niceness of a build worker once it has started: serving goes before building."""
    retraining_steps: PositiveInt = 300
    """Steps of retraining Σ on the family's own images."""
    task_retraining_steps: PositiveInt = 1000
    """Steps of retraining Σ on a task's images."""
    task_least_steps: PositiveInt = 1000
    """Steps of them without which a model is not ready, unless its loss has stopped falling."""
    retraining_max_seconds: PositiveFloat = 60.0
    """Seconds after which no step of retraining begins; on a task's images up to ten times as
    many, until `task_least_steps` are done."""

    @field_validator("allowed_hosts")
    @classmethod
    def _of_hosts(cls, given: str) -> str:
        names = [name.strip().lower().rstrip(".") for name in given.split(",") if name.strip()]
        if wrong := [name for name in names if not (name == "*" or HOST_NAME.fullmatch(name))]:
            raise ValueError(f"{wrong[0]!r} is no host's name: give it without scheme and port")
        return ",".join(names)

    @field_validator("trusted_proxies")
    @classmethod
    def _of_addresses(cls, given: str) -> str:
        addresses = [part.strip() for part in given.split(",") if part.strip()]
        for address in addresses:
            if address != "*":
                ipaddress.ip_network(address, strict=False)
        return ",".join(addresses)

    @field_validator("redis_url")
    @classmethod
    def _of_redis(cls, given: str | None) -> str | None:
        if given is not None:
            RedisAddress.of(given)
        return given

    @property
    def allowed_host_names(self) -> set[str]:
        return {name.strip() for name in self.allowed_hosts.split(",")} - {""}

    @property
    def valkey_socket(self) -> Path:
        return self.var_dir.resolve() / "valkey.sock"

    @property
    def resolved_redis_url(self) -> str:
        """Address as redis-py writes it."""
        return self.redis_url or f"unix://{self.valkey_socket}"

    @property
    def redis_address(self) -> RedisAddress:
        return RedisAddress.of(self.resolved_redis_url)

    @property
    def resolved_keys_file(self) -> Path:
        return self.keys_file or self.var_dir / "keys.json"

    @property
    def resolved_kernels_dir(self) -> Path:
        return (self.kernels_dir or self.var_dir / "kernels").resolve()

    @property
    def resolved_store_dir(self) -> Path:
        return self.store_dir or self.var_dir / "store"


@lru_cache
def get_settings() -> Settings:
    """The settings of this process; one that cannot be used ends it, with what is wrong."""
    try:
        return Settings()
    except ValidationError as error:
        for wrong in error.errors():
            name = "_".join(str(part) for part in wrong["loc"]).upper()
            message = wrong["msg"].removeprefix("Value error, ")
            print(f"FINESERVE_{name}: {message}", file=sys.stderr)  # noqa: T201
        raise SystemExit(os.EX_CONFIG) from None
