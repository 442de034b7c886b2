"""`python -m benchmarks.operate [PART …]`: benchmarks/results/operate.json and docs/figures."""

from benchmarks.operate import compose, stranger, suites
from benchmarks.parts import run

PARTS = {"compose": compose.measure, "stranger": stranger.measure, "suites": suites.measure}
SUMMARY = {
    "compose": ("compose_main_job_ok", "service_image_bytes", "worker_image_bytes"),
    "stranger": ("stranger_seconds", "page_interactive_seconds", "axe_serious"),
    "suites": ("panels", "panels_with_data", "doctor_cases_ok"),
}

if __name__ == "__main__":
    run("operate", PARTS, SUMMARY)
