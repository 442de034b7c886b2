"""Two hosts that share nothing but Redis and a bucket of a real S3 server."""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.deployment import Deployment, wait
from fineserve.wire import ExportFormat
from tests.support import buckets
from tests.support.buckets import Bucket

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with buckets.running(tmp_path_factory.mktemp("bucket")) as bucket:
        yield bucket


def host(families: Path, bucket: Bucket, **settings: object) -> Deployment:
    deployment = Deployment(
        families,
        store_url=bucket.url,
        lease_seconds=3,
        retraining_steps=20,
        profile_seconds=2,
        verify_seconds=1,
        compile="false",
        **settings,
    )
    deployment.environment |= {**bucket.environment, "OMP_NUM_THREADS": "1"}
    return deployment


def images(http: httpx.Client, model: str, seed: int = 1) -> list[str]:
    body = {"model": model, "n": 2, "seed": seed, "num_inference_steps": 5}
    answer = http.post("/generate", json=body).raise_for_status()
    return [image["b64_png"] for image in answer.json()["images"]]


def test_what_one_host_builds_another_samples_and_exports(
    families_dir: Path, bucket: Bucket
) -> None:
    with host(families_dir, bucket) as first:
        first.up()
        first.control("stop", "sample-worker")
        model = first.client.create_model(max_mem_gb=4).id
        with host(families_dir, bucket, redis_url=first.redis_url) as second:
            second.up()
            second.control("stop", "build-worker")
            first.client.wait(model)
            made = images(second.http, model)
            assert images(first.http, model) == made, "either API has what either host makes"
            exported = first.client.export(model, first.var / "exported", ExportFormat.NATIVE)
            assert [*exported.glob("*.safetensors")]
            second.http.get("/families/tiny/previews.png")
        assert not (first.var / "store").exists(), "nothing of it is on this disk"
        assert not list(second.var.glob("store/*"))
        first.control("start", "sample-worker")
        assert images(first.http, model) == made, "nothing was lost with the other host"


def test_doctor_tries_the_bucket_out(families_dir: Path, bucket: Bucket) -> None:
    with host(families_dir, bucket) as deployment:
        told = deployment.run("doctor").stdout
        assert f"{bucket.url} can be written to and read" in told
        deployment.environment["FINESERVE_STORE_URL"] = "s3://no-such-bucket/fineserve"
        assert "FINESERVE_STORE_URL" in deployment.run("doctor").stdout


def test_what_is_accepted_outlives_a_bucket_that_is_out_of_reach(
    families_dir: Path, bucket: Bucket
) -> None:
    with host(families_dir, bucket) as deployment:
        deployment.up()
        model = deployment.ready_model()
        asked = {"model": model, "n": 2, "seed": 7, "num_inference_steps": 5}
        with bucket.out_of_reach():
            answer = deployment.http.post(
                "/generate", json=asked, headers={"prefer": "respond-async"}
            )
            assert answer.status_code == 202
            time.sleep(10)
        place = answer.headers["location"]
        done = wait(
            lambda: (told := deployment.http.get(place).json())["status"] == "done" and told, 60
        )
        assert done["status"] == "done"
        assert len(images(deployment.http, model, seed=7)) == 2
