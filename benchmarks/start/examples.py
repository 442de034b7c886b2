"""Commands of README and docs that ask for a latency, on a machine that has just started."""

import re
import shlex
from contextlib import nullcontext

from benchmarks.deployment import Deployment
from benchmarks.parts import REPOSITORY, Figures, say
from benchmarks.start.first import core_taken

EXAMPLE = re.compile(r"^fineserve (.*--max-latency-ms .*)$", re.MULTILINE)


def measure() -> Figures:
    files = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
    found = [command for file in files for command in EXAMPLE.findall(file.read_text())]
    refused = []
    for beside, busy in (("idle", nullcontext()), ("busy", core_taken())):
        with Deployment() as deployment, busy:
            deployment.up()
            for command in found:
                words = shlex.split(command)
                plot = words.index("--plot") if "--plot" in words else len(words)
                done = deployment.run(*words[:plot])
                say(f"{beside}: {command}", status=done.returncode)
                if done.returncode:
                    refused.append(f"{beside}: {command}: {done.stderr}")
    return {"examples": len(found), "examples_refused": refused}
