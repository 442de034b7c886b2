"""Pin images of docker-compose.yml by their digests: writes docker/digests.yml, one more file for
compose (`-f docker-compose.yml -f docker/digests.yml`). It asks each image's registry, by `docker`.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SERVICE = re.compile(r"^  ([a-z-]+):$(?:\n(?!  [a-z]).*)*?\n    image: ([^\s$]+)$", re.MULTILINE)
HEAD = "# Made by deploy/pin_images.py; once more after a tag in docker-compose.yml has changed.\n"


def digest_of(image: str) -> str:
    """Digest of an image's newest manifest under its tag. Raises CalledProcessError."""
    command = ["docker", "buildx", "imagetools", "inspect", "--format", "{{.Manifest.Digest}}"]
    done = subprocess.run([*command, image], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def main(root: Path = ROOT) -> int:
    lines = [HEAD, "services:\n"]
    for service, image in SERVICE.findall((root / "docker-compose.yml").read_text()):
        try:
            pinned = f"{image}@{digest_of(image)}"
        except (OSError, subprocess.CalledProcessError) as error:
            told = getattr(error, "stderr", "") or error
            print(f"{image} cannot be asked for: {told}", file=sys.stderr)
            return 1
        lines.append(f"  {service}: {{image: {pinned!r}}}\n")
    (root / "docker" / "digests.yml").write_text("".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
