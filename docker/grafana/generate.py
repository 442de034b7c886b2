"""Writes dashboards/*.json, which Grafana loads: `python docker/grafana/generate.py`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parent / "dashboards"
DATASOURCE = {"type": "prometheus", "uid": "prometheus"}
WIDTH = 24


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    """Grafana's name of it."""
    queries: dict[str, str]
    """PromQL by legend."""
    what: str
    """Says what to do about it, too."""
    single: bool = False
    """One number instead of a curve."""
    worst: float | None = None
    """A single number is red from here on."""


def rate(metric: str, by: str = "") -> str:
    return f"sum by ({by}) (rate(fineserve_{metric}[$__rate_interval]))"


def mean(histogram: str, by: str = "") -> str:
    return f"{rate(f'{histogram}_sum', by)} / {rate(f'{histogram}_count', by)}"


def quantile(share: float, histogram: str, by: str = "") -> str:
    buckets = rate(f"{histogram}_bucket", f"le, {by}" if by else "le")
    return f"histogram_quantile({share}, {buckets})"


REQUESTS = "http_requests_total"
REQUEST = "http_request_duration_highr_seconds"
FAILED_SHARE = (
    '(sum(rate(fineserve_http_requests_total{status="5xx"}[$__rate_interval])) or vector(0)) '
    "/ sum(rate(fineserve_http_requests_total[$__rate_interval]))"
)
HIT_SHARE = (
    'sum by (cache) (rate(fineserve_engine_lookups_total{outcome="hit"}[$__rate_interval])) '
    f"/ {rate('engine_lookups_total', 'cache')}"
)

KEPT_SHARE = (
    'sum(increase(fineserve_promises_total{outcome="kept"}[5m])) '
    '/ sum(increase(fineserve_promises_total{outcome=~"kept|missed"}[5m]))'
)

HEALTH = (
    Panel(
        "Workers",
        "short",
        {"{{queue}}": "fineserve_workers"},
        "Workers whose heart beats. At 0 nothing of this kind is done: see their logs.",
        single=True,
    ),
    Panel(
        "Redis",
        "short",
        {"up": "fineserve_redis_up"},
        "1 when Redis answers. Without it nothing is accepted.",
        single=True,
    ),
    Panel(
        "Waiting",
        "short",
        {"{{queue}}": "fineserve_queue_depth"},
        "Messages that no worker has taken. Growing means too few workers.",
        single=True,
        worst=100,
    ),
    Panel(
        "Answers that are errors of ours",
        "percentunit",
        {"5xx": FAILED_SHARE},
        "Share of 5xx; the service's log has the reason of each.",
        single=True,
        worst=0.01,
    ),
    Panel(
        "Requests a second",
        "reqps",
        {"{{method}} {{handler}} {{status}}": rate(REQUESTS, "method, handler, status")},
        "By route and class of status.",
    ),
    Panel(
        "Time to answer",
        "s",
        {f"p{share:.0%}"[:-1]: quantile(share, REQUEST) for share in (0.5, 0.95, 0.99)},
        "Of all routes; POST /generate waits for its images.",
    ),
    Panel(
        "Wait in the queue, 95th percentile",
        "s",
        {"{{kind}}": quantile(0.95, "queue_wait_seconds", "kind")},
        "From acceptance to the first attempt.",
    ),
    Panel(
        "Under way",
        "short",
        {"{{kind}}": "fineserve_active"},
        "Accepted and not finished: models and generations.",
    ),
    Panel(
        "Finished",
        "ops",
        {"{{kind}} {{outcome}}": rate("finished_total", "kind, outcome")},
        "By how it ended. `failed` has its reason in the record.",
    ),
    Panel(
        "Memory of Redis",
        "bytes",
        {"used": "fineserve_redis_memory_bytes"},
        "With `noeviction` a full Redis refuses new work.",
    ),
    Panel(
        "Disk of the artifacts",
        "bytes",
        {"free": "fineserve_store_disk_free_bytes", "{{kind}}": "fineserve_store_bytes"},
        "What is free, and what artifacts take. With too little free nothing new is accepted.",
    ),
)
MODELS = (
    Panel(
        "Models",
        "short",
        {"{{status}}": "fineserve_models"},
        "By state. Those that stay in one before `ready` are stuck.",
        single=True,
    ),
    Panel(
        "Budgets solved",
        "ops",
        {"{{outcome}}": rate("plans_total", "outcome")},
        "`infeasible`: asked for more than any size can do.",
    ),
    Panel(
        "Time of a build's phases, mean",
        "s",
        {"{{phase}}": mean("build_phase_seconds", "phase")},
        "Retraining stops at FINESERVE_RETRAINING_MAX_SECONDS.",
    ),
    Panel(
        "Measured over predicted, median",
        "percentunit",
        {"{{quantity}}": quantile(0.5, "measured_over_predicted_ratio", "quantity")},
        "Above 1 models need more than promised; `fineserve profile` measures the device again.",
    ),
    Panel(
        "Held-out loss, mean",
        "short",
        {"{{when}}": mean("retraining_heldout_loss", "when")},
        "Before and after Σ retraining.",
    ),
    Panel(
        "Images a second",
        "ops",
        {"depth {{depth}}": rate("images_total", "depth")},
        "By depth of the model.",
    ),
)
ELASTIC = (
    Panel(
        "Promises kept",
        "percentunit",
        {"kept": KEPT_SHARE},
        "Of elastic requests that were accepted. Below 1: the device does something that the "
        "engine does not know of.",
        single=True,
    ),
    Panel(
        "Promises a second",
        "ops",
        {"{{outcome}}": rate("promises_total", "outcome")},
        "`refused` comes back when it is told to; where it stays, another worker helps.",
    ),
    Panel(
        "Quality that elastic requests were served by",
        "percentunit",
        {
            "mean": mean("elastic_quality"),
            "p5": quantile(0.05, "elastic_quality"),
        },
        "As plans state it. It falls while there is much to do, and comes back.",
    ),
    Panel(
        "Depth that elastic requests were served by",
        "short",
        {"{{worker}}": "fineserve_elastic_depth"},
        "In the mean of the last ones.",
    ),
    Panel(
        "Elastic requests a second",
        "reqps",
        {"{{worker}}": "fineserve_elastic_rate"},
        "Those that were served.",
    ),
    Panel(
        "Time of steps over what was measured",
        "short",
        {"{{worker}}": "fineserve_engine_slowdown_ratio"},
        "With all that comes between them: decisions, images that are done, other processes.",
    ),
)
DEVICE = (
    Panel(
        "Denoising steps a second",
        "ops",
        {"steps": rate("engine_step_seconds_count")},
        "Of whole batches.",
    ),
    Panel(
        "Time of a step",
        "s",
        {f"p{share:.0%}"[:-1]: quantile(share, "engine_step_seconds") for share in (0.5, 0.95)},
        "Grows with the rows of a batch; if it grows without them, something else uses the device.",
    ),
    Panel(
        "Rows in a batch, mean",
        "short",
        {"rows": mean("engine_batch_rows")},
        "A guided image has two.",
    ),
    Panel(
        "Different models in a batch, mean",
        "short",
        {"models": mean("engine_batch_models")},
        "More than one is what shared learngenes are good for.",
    ),
    Panel(
        "Running and waiting in the engine",
        "short",
        {
            "running": "sum(fineserve_engine_running)",
            "waiting": "sum(fineserve_engine_waiting)",
        },
        "Waiting parts have no room in a batch or on the device.",
    ),
    Panel(
        "Held of the device's memory",
        "bytes",
        {
            "held by {{worker}}": "fineserve_device_held_bytes",
            "budget of {{worker}}": "fineserve_device_budget_bytes",
        },
        "FINESERVE_DEVICE_MEM_GB is the budget.",
    ),
    Panel(
        "Found on the device",
        "percentunit",
        {"{{cache}}": HIT_SHARE},
        "Share of what requests needed that was there already.",
    ),
    Panel(
        "Evicted a second",
        "ops",
        {"{{what}}": rate("engine_evictions_total", "what")},
        "Steadily above 0: more models are in use than there is memory for.",
    ),
    Panel(
        "Models on the device",
        "short",
        {"{{worker}}": "fineserve_engine_models"},
        "Ready to be sampled from at once.",
    ),
    Panel(
        "Compiled",
        "percentunit",
        {"{{worker}}": "fineserve_engine_compiled"},
        "Share of what the engine uses that runs compiled: some minutes after a first start "
        "all. If it stays below, /status says why.",
    ),
    Panel(
        "Share of the time spent compiling",
        "percentunit",
        {"compiling": rate("engine_compile_seconds_sum")},
        "Beside serving, at the first start after another torch or arithmetic; then 0.",
    ),
    Panel(
        "Age of device profiles",
        "s",
        {"{{family}}": "fineserve_profile_age_seconds"},
        "Since a device was estimated or measured for a family.",
    ),
    Panel(
        "Profiles that are estimates",
        "short",
        {"{{family}}": "fineserve_profile_estimated"},
        "1 after a first start, 0 once the device has been idle for a minute.",
    ),
    Panel(
        "Corrections of profiles",
        "short",
        {"{{family}}": "fineserve_profile_correction_ratio"},
        "What models took beside what was profiled; far from 1: `fineserve profile`.",
    ),
    Panel(
        "Resident memory of workers",
        "bytes",
        {"{{worker}}": "fineserve_process_resident_bytes"},
        "Of the host.",
    ),
)
DASHBOARDS = {
    "health": ("Service health", HEALTH),
    "models": ("Models and budgets", MODELS),
    "elastic": ("Elastic requests", ELASTIC),
    "device": ("Device and engine", DEVICE),
}


def dashboard(name: str) -> dict[str, Any]:
    title, panels = DASHBOARDS[name]
    return {
        "uid": f"fineserve-{name}",
        "title": f"fineserve: {title}",
        "tags": ["fineserve"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "links": [
            {"type": "dashboards", "tags": ["fineserve"], "title": "fineserve", "asDropdown": False}
        ],
        "panels": _placed(panels),
    }


def _placed(panels: tuple[Panel, ...]) -> list[dict[str, Any]]:
    """Single numbers four in a row above, curves two in a row below them."""
    placed = []
    x = y = row_height = 0
    for number, panel in enumerate(panels, start=1):
        width, height = (WIDTH // 4, 4) if panel.single else (WIDTH // 2, 8)
        if x + width > WIDTH or height != row_height:
            x, y, row_height = 0, y + row_height, height
        placed.append(
            _panel(panel, number) | {"gridPos": {"x": x, "y": y, "w": width, "h": height}}
        )
        x += width
    return placed


def _panel(panel: Panel, number: int) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.worst is not None:
        steps.append({"color": "red", "value": panel.worst})
    return {
        "id": number,
        "type": "stat" if panel.single else "timeseries",
        "title": panel.title,
        "description": panel.what,
        "datasource": DATASOURCE,
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "min": 0,
                "thresholds": {"mode": "absolute", "steps": steps},
            },
            "overrides": [],
        },
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": DATASOURCE,
                "expr": query,
                "legendFormat": legend,
            }
            for i, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def main() -> None:
    for name in DASHBOARDS:
        (DIRECTORY / f"{name}.json").write_text(json.dumps(dashboard(name), indent=1) + "\n")


if __name__ == "__main__":
    main()
