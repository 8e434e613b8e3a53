"""What is shipped: one wheel for all CPythons, that needs nothing foreign, and that installs where there is no BPF."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the source distribution, and the wheel from that."""
    directory = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", directory, ROOT],
        check=True,
        capture_output=True,
        cwd=directory,
    )
    [built] = directory.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_no_sources(wheel: Path) -> None:
    assert "-cp311-abi3-linux_" in wheel.name
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("quicsteer-")}
    modules = {f"quicsteer/{path.name}" for path in (ROOT / "quicsteer").glob("*.py")}
    assert names == modules | {"quicsteer/_kernel.abi3.so", "quicsteer/_kernel.pyi", "quicsteer/py.typed"}


def test_the_wheel_runs_on_any_distribution(wheel: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    shown = subprocess.run(
        [sys.executable, "-m", "auditwheel", "show", wheel], check=True, capture_output=True, text=True, env=environment
    ).stdout
    assert "manylinux" in shown
    subprocess.run(
        [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", tmp_path, wheel],
        check=True,
        capture_output=True,
        env=environment,
    )
    [repaired] = tmp_path.glob("*manylinux*.whl")
    assert not [name for name in zipfile.ZipFile(repaired).namelist() if ".libs/" in name]


def test_a_fresh_environment_needs_nothing_else(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-index", wheel], check=True)
    script = "import quicsteer; quicsteer.SteeringGroup.open('127.0.0.1:0', 2, mode='cbpf').close(); print('steers')"
    done = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "steers\n"


@pytest.mark.parametrize("source", ["sockets", "loader", "spawn"])
def test_the_c_sources_compile_where_there_is_no_linux(source: str, tmp_path: Path) -> None:
    """As near as a Linux host gets to another system: the compiler does not say that it is Linux."""
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'bpf'}"]
    warnings = ["-Wall", "-Wextra", "-Werror", "-U__linux__", "-std=gnu11"]
    output = ["-c", str(ROOT / "csrc" / f"{source}.c"), "-o", str(tmp_path / "out.o")]
    subprocess.run(["cc", *warnings, *includes, *output], check=True)


def test_elsewhere_a_group_is_a_single_socket_and_says_why() -> None:
    """With the platform's name changed before the import, as near as this host gets to another system."""
    script = """
import sys
sys.platform = "darwin"
import warnings
import quicsteer
print(quicsteer.detect().best_mode)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with quicsteer.SteeringGroup.open("127.0.0.1:0", 4) as group:
        print(group.mode, len(group.workers), len(group.workers[0].connection_ids.issue()))
for warning in caught:
    print(warning.category.__name__, "darwin" in str(warning.message))
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd="/")
    assert done.stdout.splitlines() == ["single", "single 1 8", "SteeringFallbackWarning True"]
