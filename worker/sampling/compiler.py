"""Kernels, compiled in processes of their own while the engine serves without them.

Compiled graphs stay in a directory that all sampling workers of a host share: a later start only
loads them.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import structlog
import torch
from redis import RedisError

from learngenes.config import DType
from learngenes.device import compute_dtype
from learngenes.family.family import Family
from learngenes.measuring.device import computes
from learngenes.stepping.kernels import CompiledGraphs, Graph, NotOurs, graphs
from registry import metrics
from worker.leases import Stopping
from worker.sampling.engine import Engine, Key

log = structlog.get_logger()

MEASURING_SECONDS = 60.0
"""Seconds that the compiler waits for the steps of what it has compiled to be measured."""
GRAPH_SECONDS = 600.0
"""Seconds after which one graph counts as hanging."""
POLL_SECONDS = 0.2
IDLY = ("chrt", "--idle", "0") if shutil.which("chrt") else ("nice", "-n", "19")
"""Command before another, which then runs when nobody else wants a processor; nice alone gives a
compiler a fifth of the time of a thread that samples (Linux 6.18)."""
PR_SET_PDEATHSIG = 1
"""Linux' prctl: the signal that a process gets when its parent ends."""


class CannotCompile(Exception):
    """A graph cannot be compiled; the message, which operators see, says why."""


class Compiler:
    """Has what the engine uses compiled, one family and dtype after the other."""

    def __init__(
        self,
        engine: Engine,
        families: Callable[[], Sequence[Family]],
        directory: Path,
        *,
        alone: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
        command: Sequence[str] = (*IDLY, sys.executable, "-m", "worker", "compile"),
        graph_seconds: float = GRAPH_SECONDS,
    ) -> None:
        """`families`: those there are by now, the most wanted first.

        `command` compiles the graph on its stdin. Nobody measures while `alone` is held; it may
        raise Stopping.
        """
        self._engine, self._families, self._directory = engine, families, directory
        self._alone, self._command, self._graph_seconds = alone, command, graph_seconds
        self._compiles = True
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="compiler", daemon=True)
        self._done: set[Key] = set()
        self._noted: set[Key] = set()
        """What the engine was told to measure."""
        self.busy = False
        """Whether something is compiled or loaded now."""
        self.problem = ""
        """Why the engine runs uncompiled and will; empty where that is not so."""

    def start(self, *, compile: bool = True) -> None:  # noqa: A002 - as the setting is named
        """Begin; without `compile` the engine only measures what it steps by."""
        self._compiles = compile
        self._thread.start()

    def stop(self) -> None:
        """End what is under way; its graph is compiled again after the next start."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def gauges(self) -> dict[str, float]:
        """Values of registry.metrics.WORKER_GAUGES; all is done where nothing is to be."""
        if not self._compiles:
            return {"engine_compiled": 1.0}
        wanted = self._wanted()
        done = sum(self._key(*each) in self._done for each in wanted)
        return {"engine_compiled": done / len(wanted)}

    def _wanted(self) -> list[tuple[Family, DType]]:
        """The most wanted family, what is used, then every other family in its common dtype, and
        at last the most wanted one in its other.
        """
        families = self._families()
        common = [(family, DType.BFLOAT16) for family in families]
        every = [*common, *((family, DType.FLOAT32) for family in families)]
        used = [each for each in every if self._key(*each) in self._engine.costs]
        wanted = (common[0], *used, *common, (families[0], DType.FLOAT32))
        return list({self._key(*each): each for each in wanted}.values())

    def _key(self, family: Family, dtype: DType) -> Key:
        return family.fingerprint, compute_dtype(dtype, family.stem.positions.device)

    def _run(self) -> None:
        if not self._compiles:
            self._measure_rest()
            return
        try:
            compiled = CompiledGraphs(self._directory)
            os.environ.update(compiled.environment)
            while not self._stopping.wait(POLL_SECONDS):
                for family, dtype in self._wanted():
                    if self._key(family, dtype) not in self._done:
                        self.busy = True
                        with contextlib.suppress(RedisError):  # it will be back
                            self._provide(compiled, family, dtype)
                            self._let_measure(family, dtype)
                        break
                else:
                    self._have_measured()
        except Stopping:
            pass
        except (CannotCompile, NotOurs, OSError) as error:
            self._give_up(str(error))
        except Exception as error:  # whatever torch raises: serving does without
            log.exception("kernels cannot be loaded")
            self._give_up(f"{type(error).__name__}: {error}")

    def _let_measure(self, family: Family, dtype: DType) -> None:
        """Wait until the engine knows the steps of what was compiled, if nobody asks for images."""
        self._engine.measure(family, dtype)
        self.busy, until = False, time.monotonic() + MEASURING_SECONDS
        while not self._engine.is_measured(*self._key(family, dtype)):
            if self._stopping.wait(POLL_SECONDS) or time.monotonic() > until:
                break

    def _have_measured(self) -> None:
        """Have everything measured by the kernels that there are, once nothing is compiled."""
        self.busy = False
        for family in self._families():
            for dtype in computes(family.stem.positions.device).values():
                if (key := self._key(family, dtype)) not in self._noted:
                    self._noted.add(key)
                    self._engine.measure(family, dtype)

    def _measure_rest(self) -> None:
        """The same of families that are still loaded, until the end."""
        while not self._stopping.is_set():
            self._have_measured()
            self._stopping.wait(POLL_SECONDS)

    def _give_up(self, problem: str) -> None:
        self.problem = problem[:500]
        log.warning("sampling uncompiled, which is slower", reason=self.problem)
        self._measure_rest()

    def _provide(self, compiled: CompiledGraphs, family: Family, dtype: DType) -> None:
        wanted = graphs(family.manifest.network, dtype)
        began, made = time.monotonic(), self._compile(compiled, wanted)
        compiled_at = time.monotonic()
        try:
            kernels = compiled.load(wanted, self._engine.lanes)
        except NotOurs:
            raise
        except Exception as error:
            log.warning("compiled kernels are spoilt, and compiled again", reason=str(error)[-300:])
            shutil.rmtree(compiled.directory, ignore_errors=True)
            compiled.directory.mkdir(mode=0o700)
            made = self._compile(compiled, wanted)
            kernels = compiled.load(wanted, self._engine.lanes)
        compute = self._key(family, dtype)[1]
        self._engine.use(family, compute, kernels)
        self._done.add(self._key(family, dtype))
        log.info(
            "kernels ready",
            family=family.manifest.name,
            compute=str(compute),
            graphs=made,
            compile_seconds=round(compiled_at - began, 1),
            load_seconds=round(time.monotonic() - compiled_at, 2),
        )

    def _compile(self, compiled: CompiledGraphs, wanted: Sequence[Graph]) -> int:
        """Have what is missing compiled; returns the number of graphs."""
        missing = compiled.missing(wanted)
        for graph in missing:
            with self._alone(), metrics.timed(metrics.COMPILE):
                self._in_process(compiled, graph)
        return len(missing)

    def _in_process(self, compiled: CompiledGraphs, graph: Graph) -> None:
        with tempfile.TemporaryFile("w+") as said:
            with subprocess.Popen(  # noqa: S603 - our own
                [*self._command, str(self._directory)],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=subprocess.STDOUT,
                env={**os.environ, **compiled.environment},
                text=True,
            ) as process:
                assert process.stdin is not None
                with contextlib.suppress(BrokenPipeError):  # it ended; its last words say why
                    process.stdin.write(graph.model_dump_json())
                    process.stdin.close()
                deadline = time.monotonic() + self._graph_seconds
                while process.poll() is None:
                    if self._stopping.wait(POLL_SECONDS):
                        process.kill()
                        raise Stopping
                    if time.monotonic() > deadline:
                        process.kill()
                        seconds = round(self._graph_seconds)
                        raise CannotCompile(f"compiling {graph.name} took more than {seconds} s")
            if process.returncode:
                said.seek(0)
                lines = [line for line in said.read().splitlines() if line.strip()] or ["nothing"]
                raise CannotCompile(
                    f"compiling {graph.name} ended with status {process.returncode}: {lines[-1]}"
                )


def main(directory: Path) -> None:
    """Compile the graph that stands on stdin, as a process that is in nobody's way."""
    graph = Graph.model_validate_json(sys.stdin.read())
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError):  # when memory runs out it goes, not the engine
        Path("/proc/self/oom_score_adj").write_text("1000")
    torch.set_num_threads(1)
    CompiledGraphs(directory).compile(graph)
