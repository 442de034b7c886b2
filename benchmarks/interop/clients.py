"""Check 4: the same generation by `openai`, curl and `fineserve.Client`."""

import base64
import json
import subprocess

import openai

from benchmarks.deployment import Deployment
from benchmarks.parts import Figures

CLASS, SEED, STEPS, IMAGES = "Sneaker", 7, 20, 4


def measure() -> Figures:
    with Deployment(profile_seconds=5, verify_seconds=2) as deployment:
        deployment.up()
        model = deployment.ready_model()
        with openai.OpenAI(base_url=f"{deployment.url}/v1", api_key="none") as client:
            answer = client.images.generate(
                model=model,
                prompt=CLASS,
                n=IMAGES,
                response_format="b64_json",
                extra_body={"seed": SEED, "num_inference_steps": STEPS},
            )
            listed = [m.id for m in client.models.list()]
        by_openai = [base64.b64decode(image.b64_json or "") for image in answer.data or []]
        request = {"class_labels": [CLASS], "n": IMAGES, "seed": SEED, "num_inference_steps": STEPS}
        by_client = [image.png for image in deployment.client.generate(model, **request)]
        command = ["curl", "-s", "--fail", f"{deployment.url}/generate"]
        command += ["-H", "content-type: application/json"]
        command += ["-d", json.dumps({"model": model, **request})]
        told = subprocess.run(command, check=True, capture_output=True).stdout
        by_curl = [base64.b64decode(image["b64_png"]) for image in json.loads(told)["images"]]
    return {
        "images": len(by_curl),
        "model_listed": model in listed,
        "openai_client_ok": by_openai == by_client == by_curl and len(by_curl) == IMAGES,
    }
