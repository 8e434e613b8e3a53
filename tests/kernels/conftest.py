"""Kernels and the initramfs for them. ``make test-kernels`` says where the kernels are kept."""

import os
import subprocess
import sys
from pathlib import Path

import debian_kernels
import initramfs
import pytest
from debian_kernels import Kernel

TESTS = Path(__file__).parents[1]
DIRECTORY = os.environ.get("QUICSTEER_KERNELS")


@pytest.fixture(scope="session")
def all_kernels() -> list[Kernel]:
    """Every kernel, fetched if it is not there."""
    if not DIRECTORY:
        pytest.skip("QUICSTEER_KERNELS names no directory to keep kernels in: make test-kernels")
    return debian_kernels.fetch(Path(DIRECTORY).resolve())


@pytest.fixture(params=[*debian_kernels.SERIES, "newest"])
def kernel(request: pytest.FixtureRequest, all_kernels: list[Kernel]) -> Kernel:
    """The newest kernel of each series, and the newest of all."""
    if request.param == "newest":
        return max(all_kernels)
    return max(each for each in all_kernels if str(each).startswith(f"{request.param}."))


@pytest.fixture(scope="session")
def guest(tmp_path_factory: pytest.TempPathFactory, all_kernels: list[Kernel]) -> Path:
    """An initramfs with the wheel of this tree, which runs guest.py."""
    directory = tmp_path_factory.mktemp("guest")
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(directory),
        str(TESTS.parent),
    ]
    subprocess.run(command, check=True, capture_output=True, cwd=directory)
    [wheel] = directory.glob("*.whl")
    files = [*TESTS.glob("support/*.py"), *TESTS.glob("vectors/*.json"), TESTS / "kernels" / "guest.py"]
    output = directory / "guest.gz"
    initramfs.build(output, wheel, files, "guest.py")
    return output
