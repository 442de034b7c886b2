from pathlib import Path

import pytest

from learngenes import cgroup


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    monkeypatch.setattr(cgroup, "OWN", tmp_path / "own")
    return tmp_path


def write(groups: Path, **files: str) -> None:
    for name, text in files.items():
        file = groups / name.replace("__", "/").replace("_max", ".max").replace(
            "_in_", ".limit_in_"
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")


def test_without_groups_there_is_no_limit(groups: Path) -> None:
    assert (cgroup.memory_limit_bytes(), cgroup.processors_limit()) == (None, None)
    write(groups, memory_max="max", cpu_max="max 100000")
    assert (cgroup.memory_limit_bytes(), cgroup.processors_limit()) == (None, None)


def test_a_container_sees_its_group_at_the_top(groups: Path) -> None:
    write(groups, own="0::/", memory_max="1000", cpu_max="150000 100000")
    assert (cgroup.memory_limit_bytes(), cgroup.processors_limit()) == (1000, 1.5)


def test_the_least_limit_of_the_groups_around_counts(groups: Path) -> None:
    write(groups, own="0::/system.slice/fineserve.service")
    write(groups, system__slice="x")
    (groups / "system").rename(groups / "unused")
    inner = groups / "system.slice" / "fineserve.service"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("2000")
    (inner.parent / "memory.max").write_text("1000")
    (inner / "cpu.max").write_text("100000 100000")
    assert (cgroup.memory_limit_bytes(), cgroup.processors_limit()) == (1000, 1.0)


def test_groups_of_the_first_version(groups: Path) -> None:
    (groups / "own").write_text("4:memory:/docker/a\n1:cpu,cpuacct:/docker/a\n")
    for name, text in {
        "memory/memory.limit_in_bytes": "9223372036854771712",
        "memory/docker/a/memory.limit_in_bytes": "3000",
        "cpu,cpuacct/docker/a/cpu.cfs_quota_us": "50000",
        "cpu,cpuacct/docker/a/cpu.cfs_period_us": "100000",
    }.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text)
    assert (cgroup.memory_limit_bytes(), cgroup.processors_limit()) == (3000, 0.5)
