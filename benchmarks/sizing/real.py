"""`{"max_mem_gb": 4}` on the shapes of DiT-XL/2 at 512 x 512, over HTTP, for some images at once.

The budget is for the whole process, and the images as many as it binds for: of the model alone
the full size fits, and of four images its process does (`without_budget`).
Weights are random; memory and seconds are those of the network.
"""

import time

from benchmarks.deployment import FAMILIES, Deployment, wait
from benchmarks.parts import Figures, say

NETWORK = "dit-xl-2-512"
IMAGES, STEPS = 6, 2
MOST_SECONDS = 3000


def measure() -> Figures:
    with Deployment(FAMILIES, compile="false") as deployment:
        deployment.up()
        began = time.monotonic()
        deployment.run("shapes", NETWORK)
        family = f"{NETWORK}-shapes"
        asked = {
            "family": family,
            "max_mem_gb": 4,
            "mem_scope": "process",
            "n": IMAGES,
            "num_inference_steps": STEPS,
        }
        wait(lambda: deployment.http.post("/plan", json=asked).status_code == 200, 300)
        plannable = time.monotonic() - began
        done = deployment.run("profile", "--memory", "--family", family)  # until then it is a guess
        assert done.returncode == 0, done.stderr
        say("profiled", seconds=round(time.monotonic() - began - plannable))
        unbound = deployment.http.post("/plan", json={**asked, "max_mem_gb": 100}).json()["plan"]
        model = deployment.client.create_model(**asked).id
        say("deployed", model=model, plannable=round(plannable))
        ready = deployment.wait_model(model, lambda made: made.status == "ready", MOST_SECONDS)
        assert ready.measured is not None
        plan = ready.plan
        predicted, measured = plan.predicted, ready.measured
        return {
            "network": NETWORK,
            "images": IMAGES,
            "plannable_seconds": round(plannable),
            "size": f"L{plan.depth} r{plan.rank} {plan.mode} {plan.dtype}",
            "without_budget": f"L{unbound['depth']} r{unbound['rank']} {unbound['mode']} "
            f"{unbound['dtype']}, {unbound['predicted']['process_memory_bytes'] / 1e9:.2f} GB",
            "predicted_model_bytes": predicted.memory_bytes,
            "measured_model_bytes": measured.memory_bytes,
            "predicted_bytes": predicted.process_memory_bytes,
            "measured_bytes": measured.process_memory_bytes,
            "real_memory_error": round(
                measured.process_memory_bytes / predicted.process_memory_bytes - 1, 4
            ),
            "predicted_seconds": predicted.latency_seconds,
            "measured_seconds": measured.latency_seconds,
            "disturbed": ready.disturbed,
        }
