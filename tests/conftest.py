"""Small networks with random weights, and a real Valkey: no test needs a trained family."""

import logging
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import torch

from fineserve.embedded import valkey_command
from learngenes.config import Kind, NetworkConfig
from learngenes.data.labelled import LabelledImages
from learngenes.family.family import Family, load_family, save_family, write_quality
from learngenes.model.dit import Stem
from learngenes.model.factors import Learngenes, Scales
from learngenes.model.sigma import reference_scales
from learngenes.sizing.profile import DeviceProfile
from registry.settings import Settings
from tests.support.builds import build
from tests.support.devices import beat, keep_profile, made_up_profile
from tests.support.sizing import NETWORK, SIZES, quality_table, untrained_manifest
from worker.runtime import Runtime
from worker.sampling.sample import Sampling

torch.set_num_threads(1)  # the networks here are too small to share

CLASS_NAMES = ("circle", "square", "triangle", "star", "cross")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs CUDA")


@pytest.fixture(autouse=True)
def log_handlers() -> Iterator[None]:
    """The root logger's, as they were: what a test has set would write to its closed output."""
    before = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers = before


@pytest.fixture
def network() -> NetworkConfig:
    return NETWORK


@pytest.fixture
def genes(network: NetworkConfig) -> Learngenes:
    torch.manual_seed(1)
    return Learngenes(network)


@pytest.fixture
def stem(network: NetworkConfig) -> Stem:
    """Stem without zeros, so that every part of the network shows in its output."""
    torch.manual_seed(2)
    stem = Stem(network)
    for parameter in stem.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return stem


@pytest.fixture
def scales(network: NetworkConfig) -> Scales:
    torch.manual_seed(3)
    scales = reference_scales(network)
    for kind in Kind:
        torch.nn.init.normal_(scales.sigma[kind])
        torch.nn.init.normal_(scales.bias[kind], std=0.2)
    return scales


@pytest.fixture
def limited_data(network: NetworkConfig) -> LabelledImages:
    """Images of one brightness per class, with noise: something that can be learned."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.arange(200) % network.num_classes
    noise = torch.randint(0, 40, (200, 3, 8, 8), generator=generator)
    images = (labels * 40)[:, None, None, None] + noise
    return LabelledImages(images.to(torch.uint8), labels, CLASS_NAMES)


@pytest.fixture
def families_dir(
    tmp_path: Path,
    network: NetworkConfig,
    genes: Learngenes,
    stem: Stem,
    scales: Scales,
    limited_data: LabelledImages,
) -> Path:
    """Directory of one untrained family, `tiny`, whose quality table is made up."""
    manifest = untrained_manifest("tiny", network, CLASS_NAMES)
    directory = tmp_path / "families"
    save_family(directory / "tiny", manifest, genes, stem, {network.depth: scales}, limited_data)
    write_quality(directory / "tiny", quality_table(SIZES))
    return directory


@pytest.fixture
def family(families_dir: Path) -> Family:
    return load_family(families_dir / "tiny")


@pytest.fixture
def profile(family: Family) -> DeviceProfile:
    return made_up_profile(family)


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    """URL of a real server on a unix socket, for the whole session."""
    directory = Path(tempfile.mkdtemp(prefix="fineserve-"))
    socket = directory / "valkey.sock"
    command = valkey_command(socket, directory)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        while not socket.exists():
            assert server.poll() is None, "Valkey did not start"
            time.sleep(0.01)
        yield f"unix://{socket}"
        server.terminate()
    shutil.rmtree(directory)


@pytest.fixture
def client(valkey_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(valkey_url, decode_responses=True) as client:
        client.flushall()
        yield client


@pytest.fixture
def settings(client: redis.Redis, valkey_url: str, tmp_path: Path, families_dir: Path) -> Settings:
    return Settings(
        redis_url=valkey_url,
        var_dir=tmp_path / "var",
        families_dir=families_dir,
        retraining_steps=4,
        verify_seconds=0.1,
        lease_seconds=2,
        build_nice=0,
        task_least_steps=1,
        profile_seconds=0.2,
        wait_seconds=20,
        max_images_per_request=20,
        compile=False,
        max_batch_rows=16,
        device_mem_gb=0.5,
    )


@pytest.fixture
def runtime(settings: Settings, profile: DeviceProfile) -> Runtime:
    """A build worker, announced, on a device that has its profile."""
    runtime = Runtime.start(settings)
    runtime.announce_families()
    keep_profile(runtime.repository, profile)
    beat(runtime)
    return runtime


@pytest.fixture
def sampler(runtime: Runtime) -> Iterator[Sampling]:
    sampler = Sampling(runtime)
    yield sampler
    sampler.engine.stop()


@pytest.fixture
def working(runtime: Runtime, sampler: Sampling) -> Iterator[None]:
    """Workers that take every record as soon as it is accepted."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.01):
            for model in runtime.repository.models.active():
                build(runtime, model.id)
            for generation in runtime.repository.generations.active():
                sampler.generate(generation.id)

    thread = threading.Thread(target=work)
    thread.start()
    yield
    stop.set()
    thread.join()
