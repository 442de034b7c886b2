"""Write docs/metrics.md from a live service: `python docs/list_metrics.py URL`."""

import sys
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

PAGE = Path(__file__).parent / "metrics.md"
UNITS = {"_seconds": "seconds", "_bytes": "bytes", "_ratio": "ratio"}
HEAD = """# Metrics

What `GET /metrics` tells, of all processes on the host; from `docs/list_metrics.py`.

| metric | type | unit | labels | |
|---|---|---|---|---|
"""


def rows(exposition: str) -> list[str]:
    """One for each metric of ours in Prometheus's text format."""
    found = []
    for family in text_string_to_metric_families(exposition):
        if not family.name.startswith("fineserve_"):
            continue
        name = family.name + ("_total" if family.type == "counter" else "")
        unit = next((unit for end, unit in UNITS.items() if family.name.endswith(end)), "count")
        labels = sorted({f"`{label}`" for s in family.samples for label in s.labels} - {"`le`"})
        found.append(
            f"| `{name}` | {family.type} | {unit} | {', '.join(labels)} | {family.documentation} |"
        )
    return sorted(found)


def main(url: str) -> None:
    exposition = httpx.get(f"{url}/metrics").raise_for_status().text
    PAGE.write_text(HEAD + "\n".join(rows(exposition)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
