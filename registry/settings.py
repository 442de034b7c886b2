"""All settings of every process, from FINESERVE_* variables."""

from functools import lru_cache
from pathlib import Path

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="FINESERVE_")

    host: str = "127.0.0.1"
    trusted_network: bool = False
    """Whether `host` may be other than a loopback address though there are no API keys: where a
    container's port is published to this host alone, or a proxy authenticates whoever comes."""
    allowed_hosts: str = ""
    """Names, separated by commas, that it is called by besides localhost, while there are no API
    keys; `*` is any, which lets every web page that is opened on this host call it."""
    port: int = Field(8000, ge=1, le=65535)

    var_dir: Path = Path("var")
    """Where the embedded default keeps its data, logs and sockets."""
    redis_url: str | None = None
    """An outside Redis or Valkey; without it the embedded one in `var_dir` is used."""
    store_dir: Path | None = None
    """The artifact store; by default `var_dir`/store."""
    families_dir: Path = Path("families")
    default_family: str = "fashion"
    """The one that is meant where a request names none and workers hold several."""

    metrics_port: int | None = Field(None, ge=1, le=65535)
    """On which a worker answers Prometheus itself; without it /metrics of the service tells what
    workers count, if they count into the same directory (PROMETHEUS_MULTIPROC_DIR)."""
    metrics_host: str = "127.0.0.1"

    api_key: SecretStr | None = None
    """What the command line sends to a service that has API keys."""
    keys_file: Path | None = None
    """Of API keys; by default `var_dir`/keys.json. While there is none, everybody may do all."""
    trusted_proxies: str = ""
    """Addresses, separated by commas, whose X-Forwarded headers tell who the client is."""
    max_active_models: PositiveInt = 200
    """Accepted and not finished, of everybody together; more are told to come back later."""
    max_active_generations: PositiveInt = 2000

    min_free_disk_gb: NonNegativeFloat = 0.2
    """Of 10^9 bytes, where the artifacts are: with less nothing new is accepted."""

    max_store_gb: PositiveFloat | None = None
    """Of 10^9 bytes that artifacts may take in all: with more nothing new is accepted."""

    log_format: str = Field("json", pattern="^(json|console)$")

    max_upload_mb: PositiveFloat = 256.0
    """Of an archive of images, of 10^6 bytes; and so many when it is unpacked:"""
    max_unpacked_mb: PositiveFloat = 1024.0
    max_task_images: PositiveInt = 20_000
    max_task_mb: PositiveFloat = 100.0
    """Of a task's images, scaled to the family's size."""
    max_task_classes: PositiveInt = 1000
    max_tasks: PositiveInt = 50
    """Of one owner."""

    max_images_per_request: PositiveInt = 128
    max_inference_steps: PositiveInt = 250
    wait_seconds: PositiveFloat = 300.0
    """How long POST /generate waits before it answers 202 instead."""

    max_concurrent_generations: PositiveInt = 64
    """So many a sampling worker takes from the queue at once; its engine decides who runs."""
    max_batch_rows: PositiveInt = 64
    """Rows of one step at most; a guided image has two."""
    latency_target_ratio: PositiveFloat = 2.0
    """A generation of a model without a latency budget may take so many times what it takes in a
    full batch before others wait for it."""
    device_mem_gb: PositiveFloat | None = None
    """What the sampling engine may hold, of 10^9 bytes; by default most of a GPU's memory, half
    of a CPU's."""
    compile: bool = True
    """Whether a sampling worker compiles its kernels at its first start, which takes minutes."""

    max_attempts: PositiveInt = 3
    lease_seconds: PositiveFloat = 15.0
    """A worker that has not been heard of for so long has lost its task."""
    stuck_seconds: PositiveFloat = 300.0
    """A worker whose work has not moved for so long ends, for its supervisor to start another."""
    visibility_timeout_seconds: PositiveInt = 3600
    """Longer than the longest task: the broker delivers again after it."""
    image_ttl_seconds: PositiveInt = 24 * 3600
    profile_seconds: PositiveFloat = 30.0
    """About how long a worker measures its device for a family it has not met on it."""
    verify_seconds: PositiveFloat = 20.0
    """No batch beyond the first ones is timed after it when a model is verified."""
    retraining_steps: PositiveInt = 300
    task_retraining_steps: PositiveInt = 1000
    """Of a task that is not the family's own; both end at the latest after"""
    retraining_max_seconds: PositiveFloat = 60.0

    @property
    def allowed_host_names(self) -> set[str]:
        return {name.strip() for name in self.allowed_hosts.split(",")} - {""}

    @property
    def valkey_socket(self) -> Path:
        return self.var_dir.resolve() / "valkey.sock"

    @property
    def resolved_redis_url(self) -> str:
        """As redis-py writes it."""
        return self.redis_url or f"unix://{self.valkey_socket}"

    @property
    def broker_url(self) -> str:
        """As kombu writes it."""
        url = self.resolved_redis_url
        return "redis+socket://" + url.removeprefix("unix://") if url.startswith("unix:") else url

    @property
    def resolved_keys_file(self) -> Path:
        return self.keys_file or self.var_dir / "keys.json"

    @property
    def resolved_store_dir(self) -> Path:
        return self.store_dir or self.var_dir / "store"


@lru_cache
def get_settings() -> Settings:
    return Settings()
