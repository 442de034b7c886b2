"""`python -m benchmarks.importing [PART …]`: benchmarks/results/importing.json."""

from benchmarks.importing import half, xl
from benchmarks.parts import run

PARTS = {"half": half.measure, "dit_xl": xl.measure}
SUMMARY = {
    "half": ("import_full_max_abs_diff", "import_seconds", "half_depth_fd_over_pruned"),
    "dit_xl": ("peak_gb", "of_machine_gb"),
}

if __name__ == "__main__":
    run("importing", PARTS, SUMMARY)
