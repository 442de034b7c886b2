"""Compiled ahead, kept and loaded: a small graph that takes seconds; all of them in test_batch."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from learngenes.config import DType, NetworkConfig
from learngenes.stepping import arithmetic, kernels
from learngenes.stepping.kernels import CompiledGraphs, Graph, NotOurs, Spoilt, graphs
from learngenes.stepping.lanes import Lanes


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CompiledGraphs:
    compiled = CompiledGraphs(tmp_path / "kernels")
    for name, value in compiled.environment.items():
        monkeypatch.setenv(name, value)
    return compiled


@pytest.fixture
def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of compiling: a file with the name of the function; loading gives it back."""

    def compile_ahead(function: Any, _: object, __: int, file: Path) -> None:
        file.write_text(function.__name__)

    monkeypatch.setattr(kernels, "compile_ahead", compile_ahead)
    monkeypatch.setattr(
        kernels, "load_compiled", lambda file: getattr(arithmetic, file.read_text())
    )


def test_what_was_compiled_takes_any_number_of_rows(
    compiled: CompiledGraphs, network: NetworkConfig
) -> None:
    graph = graphs(network, DType.FLOAT32)[0]
    compiled.compile(graph)
    again = CompiledGraphs(compiled.directory.parent)
    assert again.missing([graph]) == []
    embed = again.load([graph], Lanes()).embed
    side, patch = network.sample_size, network.patch_size
    weight = torch.randn(network.in_channels * patch**2, network.width)
    constants = torch.randn(network.width), torch.randn(network.tokens, network.width), patch
    for rows in (1, 2, 7):
        x = torch.randn(rows, network.in_channels, side, side)
        with torch.inference_mode():
            ours = embed(x, weight, *constants)
        torch.testing.assert_close(ours, arithmetic.embed(x, weight, *constants))


def test_families_share_the_graphs_that_are_the_same(network: NetworkConfig) -> None:
    other = network.model_copy(update={"in_channels": network.in_channels + 1, "rank": 8})
    ours, theirs = (graphs(each, DType.FLOAT32) for each in (network, other))
    assert [a == b for a, b in zip(ours, theirs, strict=True)] == [False, True, True, False]
    assert len({graph.name for graph in ours}) == 4


@pytest.mark.usefixtures("without_a_compiler")
def test_what_was_changed_since_is_not_run(
    compiled: CompiledGraphs, network: NetworkConfig
) -> None:
    wanted = graphs(network, DType.FLOAT32)
    for graph in wanted:
        compiled.compile(graph)
    assert compiled.load(wanted, Lanes()).are_compiled is False  # they are what they were made of
    file = compiled.directory / f"{wanted[1].name}.kernel"
    file.write_text("finish")
    with pytest.raises(Spoilt, match="materialised_block"):
        CompiledGraphs(compiled.directory.parent).load(wanted, Lanes())
    file.unlink()
    with pytest.raises(Spoilt):
        CompiledGraphs(compiled.directory.parent).load(wanted, Lanes())


@pytest.mark.usefixtures("without_a_compiler")
def test_others_must_not_be_able_to_write_there(
    compiled: CompiledGraphs, network: NetworkConfig
) -> None:
    wanted = graphs(network, DType.FLOAT32)
    for graph in wanted:
        compiled.compile(graph)
    assert compiled.directory.stat().st_mode & 0o077 == 0
    for path in (compiled.directory.parent, compiled.directory, compiled.directory / "files.json"):
        mode = path.stat().st_mode
        path.chmod(0o777)
        with pytest.raises(NotOurs, match="FINESERVE_KERNELS_DIR"):
            CompiledGraphs(compiled.directory.parent)
        with pytest.raises(NotOurs):
            compiled.load(wanted, Lanes())
        path.chmod(mode)
    compiled.load(wanted, Lanes())


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
@pytest.mark.usefixtures("without_a_compiler")
def test_what_another_user_wrote_is_not_run(
    compiled: CompiledGraphs, network: NetworkConfig
) -> None:
    graph = graphs(network, DType.FLOAT32)[0]
    compiled.compile(graph)
    os.chown(compiled.directory / f"{graph.name}.kernel", 12345, 12345)
    with pytest.raises(NotOurs):
        compiled.load([graph], Lanes())


@pytest.mark.usefixtures("without_a_compiler")
@pytest.mark.parametrize("changed", ["torch", "arithmetic"])
def test_another_torch_or_arithmetic_has_graphs_of_its_own(
    compiled: CompiledGraphs,
    network: NetworkConfig,
    monkeypatch: pytest.MonkeyPatch,
    changed: str,
) -> None:
    graph = graphs(network, DType.FLOAT32)[0]
    compiled.compile(graph)
    if changed == "torch":
        monkeypatch.setattr("torch.__version__", "99.0")
    else:
        monkeypatch.setattr(kernels.inspect, "getsource", lambda _: "other code")
    assert CompiledGraphs(compiled.directory.parent).missing([graph]) == [graph]


def test_a_list_of_files_that_is_spoilt_is_none(
    compiled: CompiledGraphs, network: NetworkConfig
) -> None:
    (compiled.directory / "files.json").write_text("{")
    graph: Graph = graphs(network, DType.FLOAT32)[0]
    assert compiled.missing([graph]) == [graph]
