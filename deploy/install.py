"""Install this checkout into the environment that runs this: `python deploy/install.py ROLE`.

What a role needs is in deploy/locks, with hashes, torch apart (see deploy/lock.py).

By uv, which takes a tenth of pip's time, and which knows nothing of pip's own configuration: it is
told what that says. Where that says something which uv has no word for, pip installs.
"""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOCKS = ROOT / "deploy" / "locks"
TORCH = LOCKS / "torch.txt"
PIP = [sys.executable, "-m", "pip"]
SAME = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "cert": "SSL_CERT_FILE",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "no-index": "UV_NO_INDEX",
}
"""Options of pip's configuration, and the variables of uv that mean the same."""
MEANINGLESS = {"disable-pip-version-check", "no-input", "no-cache-dir", "progress-bar", "quiet"}
SPACED = {"find-links", "constraint", "extra-index-url"}
"""Options that may have several values, apart by spaces; uv wants commas for find-links."""
STARTED = "import fineserve.cli.main, service.app, worker.app, worker.export.export"
STARTED += "; import torch._inductor.compile_fx; from diffusers import AutoencoderKL"
"""What a start imports, for its bytecode; that of everything, which tests have, takes longer."""
ALL = ["-q", "-j", "0", sysconfig.get_path("purelib")]
NOISE = re.compile(r"^WARNING: Location .* is ignored: it is neither a file nor a directory\.$")


def uv_environment(configuration: str) -> dict[str, str] | None:
    """Variables for uv from `pip config list`; None where it has no word for one of the options."""
    environment = {"UV_INDEX_STRATEGY": "unsafe-best-match", "UV_LINK_MODE": "copy"}
    found = re.findall(r"^(\S+?)\.(\S+)='(.*)'$", configuration, re.MULTILINE)
    for section, option, value in sorted(found, key=lambda each: each[0] == ":env:"):
        name = option.lstrip(".")
        if section not in (":env:", "global", "install") or name in MEANINGLESS:
            continue
        if name not in SAME:
            return None
        values = value.replace("\\n", " ").split() if name in SPACED else [value]
        environment[SAME[name]] = ("," if name == "find-links" else " ").join(values)
    return environment


def install(command: list[str], environment: dict[str, str]) -> bool:
    """Whether a command succeeded; says what it says but for what nobody can use."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        command, cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True
    )
    said = [line for line in done.stderr.splitlines() if not NOISE.match(line)]
    if said and done.returncode:
        print(*said, sep="\n", file=sys.stderr)
    return done.returncode == 0


def main(role: str) -> int:
    listed = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True, check=True)
    environment = uv_environment(listed.stdout)
    hashed = ["--no-deps", "--require-hashes", "--requirement"]
    parts = [
        [*hashed, str(LOCKS / f"{role}.txt")],
        ["--requirement", str(TORCH)],
        ["--no-deps", "--no-build-isolation", "--editable", str(ROOT)],
    ]
    pip = [*PIP, "install", "--quiet"]
    if environment is not None and install([*pip, *hashed, str(LOCKS / "uv.txt")], {}):
        uv = [str(Path(sys.executable).parent / "uv"), "pip", "install", "--quiet"]
        uv += ["--python", sys.executable]
        # a constraint without a hash, of a package that is not among those, would be refused
        free = {k: v for k, v in environment.items() if k != "UV_CONSTRAINT"}
        environments = [free, environment, environment]
        if all(install([*uv, *part], e) for part, e in zip(parts, environments, strict=True)):
            compiling = ["-c", STARTED] if role == "server" else ["-m", "compileall", *ALL]
            install([sys.executable, "-W", "ignore", *compiling], {})
            return 0
        print("uv cannot install it, so pip does", file=sys.stderr)
    return 0 if all(install([*pip, *part], {}) for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
