"""What may be held is the least that any limit of this process leaves."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from prufed_cli.pruning.memory import available_memory

GB = 10**9
NO_LIMIT = 9223372036854771712
"""What version 1 says where there is no limit."""


def process(directory: Path, *lines: str) -> Path:
    path = directory / "process"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def group(directory: Path, limit: int | str, used: int, cached: int = 0) -> None:
    """Write the figures of a control group of version 2."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "memory.max").write_text(f"{limit}\n")
    (directory / "memory.current").write_text(f"{used}\n")
    (directory / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\nactive_file 7\n")


def old_group(directory: Path, limit: int, used: int, cached: int = 0) -> None:
    """Write the figures of a control group of version 1."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (directory / "memory.usage_in_bytes").write_text(f"{used}\n")
    (directory / "memory.stat").write_text(
        f"inactive_file 3\nactive_file 7\ntotal_inactive_file {cached}\n"
    )


@pytest.fixture
def mount(tmp_path: Path) -> Path:
    return tmp_path / "cgroup"


@pytest.fixture
def free(tmp_path: Path) -> int:
    """What there is where no control group says anything, as it was a moment ago."""
    found = available_memory(tmp_path / "nothing", tmp_path / "nowhere")
    assert found > 0.1 * GB, "these tests need some memory"
    return found


@pytest.mark.parametrize("limited", ["", "slurm", "slurm/job_7", "slurm/job_7/step_0"])
def test_the_limit_of_a_job_is_seen_at_any_level(tmp_path: Path, mount: Path, limited: str) -> None:
    (mount / "slurm/job_7/step_0").mkdir(parents=True)
    for each in ("slurm", "slurm/job_7", "slurm/job_7/step_0"):
        group(mount / each, "max", 10**7)
    group(mount / limited, 50 * 10**6, 30 * 10**6, cached=5 * 10**6)
    told = process(tmp_path, "1:name=systemd:/elsewhere", "0::/slurm/job_7/step_0")
    assert available_memory(told, mount) == int(25 * 10**6 * 0.9)


def test_the_least_of_several_limits_counts(tmp_path: Path, mount: Path) -> None:
    group(mount / "user.slice", 80 * 10**6, 70 * 10**6)
    group(mount / "user.slice/run.scope", 50 * 10**6, 10**6)
    told = process(tmp_path, "0::/user.slice/run.scope")
    assert available_memory(told, mount) == int(10 * 10**6 * 0.9)


@pytest.mark.parametrize("limited", ["memory", "memory/docker", "memory/docker/c0ffee"])
@pytest.mark.parametrize("controllers", ["memory", "cpu,memory"])
def test_control_groups_of_version_1(
    tmp_path: Path, mount: Path, limited: str, controllers: str
) -> None:
    for each in ("memory", "memory/docker", "memory/docker/c0ffee"):
        old_group(mount / each, NO_LIMIT, 10**7)
    old_group(mount / limited, 50 * 10**6, 30 * 10**6, cached=5 * 10**6)
    told = process(
        tmp_path, "8:pids:/docker/c0ffee", f"4:{controllers}:/docker/c0ffee", "0::/docker/c0ffee"
    )
    assert available_memory(told, mount) == int(25 * 10**6 * 0.9)


def test_a_container_whose_own_group_is_the_mount(tmp_path: Path, mount: Path) -> None:
    old_group(mount / "memory", 50 * 10**6, 30 * 10**6)
    told = process(tmp_path, "4:memory:/docker/c0ffee")
    assert available_memory(told, mount) == int(20 * 10**6 * 0.9)
    group(mount, 40 * 10**6, 30 * 10**6)
    told = process(tmp_path, "0::/docker/c0ffee")
    assert available_memory(told, mount) == int(10 * 10**6 * 0.9)
    assert available_memory(tmp_path / "unreadable", mount) == int(10 * 10**6 * 0.9)


def test_no_limit_is_none(tmp_path: Path, mount: Path, free: int) -> None:
    group(mount, "max", 10**9)
    old_group(mount / "memory/job", NO_LIMIT, 10**9)
    told = process(tmp_path, "4:memory:/job", "0::/")
    assert available_memory(told, mount) > free / 2  # others on this machine take and give back


def test_a_group_that_has_used_more_than_its_limit_leaves_nothing(
    tmp_path: Path, mount: Path
) -> None:
    group(mount / "job", 10**6, 2 * 10**6)
    assert available_memory(process(tmp_path, "0::/job"), mount) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="others do not hold to this limit")
def test_a_limit_of_addresses_counts_what_the_process_has_taken() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**28, hard))
    try:
        found = available_memory()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert 2**27 < found <= 2**28 * 0.9 + 2**20
