"""Writes docs/metrics.md from a live service: `python docker/prometheus/list_metrics.py URL`."""

import sys
import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

PAGE = Path(__file__).parent.parent.parent / "docs" / "metrics.md"
UNITS = {"_seconds": "seconds", "_bytes": "bytes", "_ratio": "ratio"}
HEAD = """# Metrics

Of `GET /metrics`, summed over all processes of the host; made by `docker/prometheus/list_metrics.py`.

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
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        PAGE.write_text(HEAD + "\n".join(rows(answer.read().decode())) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
