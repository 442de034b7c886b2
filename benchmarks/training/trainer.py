"""Trains in a process of its own, so many steps at a time; runs at either commit.

Reads a configuration, then commands, as lines of JSON; answers each command with a line.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

try:
    from learngenes.training.config import PretrainingConfig
    from learngenes.training.pretrain import Pretraining

    advance = Pretraining.advance
except ImportError:  # as it was
    from learngenes.pretrain import Pretraining, PretrainingConfig

    def advance(pretraining: Pretraining) -> float:
        loss: float = pretraining._train_step()
        pretraining.step += 1
        return loss


def main() -> None:
    config = PretrainingConfig.model_validate_json(sys.stdin.readline())
    with tempfile.TemporaryDirectory() as work:
        pretraining = Pretraining(config, Path(work))
        for line in sys.stdin:
            started = time.perf_counter()
            answer: dict[str, object]
            if json.loads(line) == "loss":
                answer = {"losses": pretraining.heldout_losses()}
            else:
                for _ in range(int(line)):
                    advance(pretraining)
                answer = {"seconds": time.perf_counter() - started}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
