"""`python -m benchmarks.healing [FAMILY …]`: benchmarks/results/healing.json."""

import functools

from benchmarks.healing import families, healing
from benchmarks.parts import run

PARTS = {
    **{
        name: functools.partial(healing.measure, trained)
        for name, trained in families.FAMILIES.items()
    },
    "both": healing.both,
}
SUMMARY = {
    "both": ("healed_4bit_gap", "healed_over_best_rival", "losses_4_bits", "losses_3_bits"),
}

if __name__ == "__main__":
    run("healing", PARTS, SUMMARY)
