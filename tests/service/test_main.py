import subprocess
import sys

import pytest

from registry.settings import Settings
from service.__main__ import check_host


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "example.org"])
def test_off_loopback_the_service_refuses_to_start(host: str) -> None:
    with pytest.raises(SystemExit, match="would let anybody in"):
        check_host(Settings(host=host))


@pytest.mark.parametrize(
    ("host", "trusted"),
    [("127.0.0.1", False), ("::1", False), ("localhost", False), ("0.0.0.0", True)],
)
def test_loopback_and_a_trusted_network_are_served(host: str, trusted: bool) -> None:
    check_host(Settings(host=host, trusted_network=trusted))


def test_the_service_runs_where_there_is_no_torch() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'diffusers', 'accelerate', 'torchao'):\n"
        "    sys.modules[name] = None\n"
        "import service.__main__\n"
        "service.__main__.make_app()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
