"""Compiling beside the engine, by a stand-in for the process that compiles."""

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from redis import RedisError

from learngenes.config import DType
from learngenes.family.family import Family
from learngenes.stepping import arithmetic, kernels
from tests.support.engines import SECONDS, GatedEngine, Model, images_of, wait_until
from worker.sampling.compiler import Compiler

WRITES = """
import hashlib, json, pathlib, sys
graph = json.load(sys.stdin)
(directory,) = pathlib.Path(sys.argv[1]).iterdir()
shape = "d{width}h{heads}t{tokens}".format(**graph)
picture = "-c{channels}s{side}".format(**graph) if graph["channels"] else ""
name = f"{graph['function']}-{graph['compute']}-{shape}{picture}.kernel"
(directory / name).write_text(graph["function"])
files = directory / "files.json"
known = json.loads(files.read_text()) if files.exists() else {}
known[name] = hashlib.sha256((directory / name).read_bytes()).hexdigest()
files.write_text(json.dumps(known))
with (directory.parent.parent / "compiled").open("a") as log:
    log.write(name + "\\n")
"""

MakeCompiler = Callable[..., Compiler]


@pytest.fixture
def make_compiler(
    engine: GatedEngine, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MakeCompiler]:
    def loaded(file: Path) -> Callable[..., object]:
        function = getattr(arithmetic, file.read_text())
        return functools.partial(function)

    for name in ("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.setenv(name, "")  # restored afterwards
    monkeypatch.setattr(kernels, "load_compiled", loaded)
    made = []

    def make(code: str = WRITES, graph_seconds: float = 60.0, **options: Any) -> Compiler:
        command = (sys.executable, "-c", code)
        compiler = Compiler(
            engine,
            lambda: [family],
            tmp_path / "kernels",
            command=command,
            graph_seconds=graph_seconds,
            **options,
        )
        made.append(compiler)
        compiler.start()
        return compiler

    yield make
    for compiler in made:
        compiler.stop()


def compiled(tmp_path: Path) -> list[str]:
    log = tmp_path / "compiled"
    return log.read_text().splitlines() if log.exists() else []


def test_the_engine_goes_on_by_compiled_kernels(
    make_compiler: MakeCompiler, engine: GatedEngine, tmp_path: Path
) -> None:
    images_of(engine.begin(Model(dtype=DType.BFLOAT16)))
    compiler = make_compiler()
    wait_until(lambda: compiler.gauges["engine_compiled"] == 1)
    assert len(compiled(tmp_path)) == 8
    wait_until(lambda: not compiler.busy)
    assert compiler.problem == ""
    assert len(images_of(engine.begin(Model(dtype=DType.BFLOAT16)))) == 2
    wait_until(lambda: all(kernels.are_compiled for kernels in engine._kernels.values()))


def test_the_default_family_is_compiled_in_both_dtypes_the_common_one_first(
    make_compiler: MakeCompiler, tmp_path: Path
) -> None:
    compiler = make_compiler()
    wait_until(lambda: compiler.gauges["engine_compiled"] == 1)
    dtypes = [name.split("-")[1] for name in compiled(tmp_path)]
    assert dtypes == ["bfloat16"] * 4 + ["float32"] * 4


def test_nothing_is_compiled_while_another_measures(
    make_compiler: MakeCompiler, tmp_path: Path
) -> None:
    measuring, asked = threading.Lock(), threading.Event()

    @contextmanager
    def alone() -> Iterator[None]:
        asked.set()
        with measuring:
            yield

    with measuring:
        compiler = make_compiler(alone=alone)
        assert asked.wait(SECONDS)
        assert compiler.gauges["engine_compiled"] == 0
        assert compiled(tmp_path) == []
    wait_until(lambda: compiler.gauges["engine_compiled"] == 1)


def test_a_broker_that_is_away_for_a_while_does_not_end_it(make_compiler: MakeCompiler) -> None:
    away = iter([True, True])

    def alone() -> AbstractContextManager[None]:
        if next(away, False):
            raise RedisError
        return nullcontext()

    compiler = make_compiler(alone=alone)
    wait_until(lambda: compiler.gauges["engine_compiled"] == 1)
    assert compiler.problem == ""


def test_a_later_start_compiles_nothing(make_compiler: MakeCompiler, tmp_path: Path) -> None:
    for _ in range(2):
        compiler = make_compiler()
        wait_until(lambda made=compiler: made.gauges["engine_compiled"] == 1)  # type: ignore[misc]
        compiler.stop()
    assert len(compiled(tmp_path)) == 8


def test_what_is_spoilt_is_compiled_again(make_compiler: MakeCompiler, tmp_path: Path) -> None:
    compiler = make_compiler()
    wait_until(lambda: compiler.gauges["engine_compiled"] == 1)
    compiler.stop()
    (spoilt, *_) = (tmp_path / "kernels").rglob("finish-bfloat16*")
    spoilt.write_bytes(spoilt.read_bytes()[:3])
    compiler = make_compiler()
    wait_until(lambda: compiler.gauges["engine_compiled"] == 1)
    assert len(compiled(tmp_path)) == 16, "what lies beside it is not trusted either"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise SystemExit('no C++ compiler')", "no C++ compiler"),
        ("raise OSError(28, 'No space left on device')", "No space left on device"),
        ("import os; os.kill(os.getpid(), 9)", "status -9: nothing"),
    ],
)
def test_what_cannot_be_compiled_is_served_all_the_same(
    make_compiler: MakeCompiler, engine: GatedEngine, code: str, reason: str
) -> None:
    compiler = make_compiler(code)
    wait_until(lambda: compiler.problem != "")
    assert reason in compiler.problem
    assert compiler.gauges == {"engine_compiled": 0}
    assert len(images_of(engine.begin())) == 2


def test_a_compiler_that_hangs_is_ended(make_compiler: MakeCompiler, engine: GatedEngine) -> None:
    compiler = make_compiler("import time; time.sleep(1000)", graph_seconds=0.5)
    wait_until(lambda: compiler.problem != "")
    assert "took more than" in compiler.problem
    assert len(images_of(engine.begin())) == 2


def test_a_directory_that_others_may_write_to_is_not_used(
    make_compiler: MakeCompiler, tmp_path: Path
) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels").chmod(0o777)
    compiler = make_compiler()
    wait_until(lambda: compiler.problem != "")
    assert "others may write to it" in compiler.problem
    assert compiled(tmp_path) == []


def test_a_worker_that_ends_does_not_wait_for_a_compiler(make_compiler: MakeCompiler) -> None:
    compiler = make_compiler("import time; time.sleep(1000)")
    wait_until(lambda: compiler.busy)
    stopping = threading.Thread(target=compiler.stop)
    stopping.start()
    stopping.join(timeout=20)
    assert not stopping.is_alive()
    assert compiler.problem == ""


def test_nothing_is_missing_where_nothing_is_to_be_compiled(
    engine: GatedEngine, family: Family, tmp_path: Path
) -> None:
    compiler = Compiler(engine, lambda: [family], tmp_path / "kernels")
    assert compiler.gauges == {"engine_compiled": 0}
    compiler.start(compile=False)
    assert compiler.gauges == {"engine_compiled": 1}
    compiler.stop()
