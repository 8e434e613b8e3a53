"""What is shipped: one wheel for all CPythons, that needs nothing foreign, and that installs where there is no BPF."""

import hashlib
import json
import os
import shutil
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


COPIED = ("csrc", "bpf", "quicsteer", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
MOMENT = {"SOURCE_DATE_EPOCH": "1700000000"}


def build_copy(directory: Path) -> Path:
    """Build a wheel from a copy of the sources that lies elsewhere."""
    directory.mkdir()
    for name in COPIED:
        source, ignore = ROOT / name, shutil.ignore_patterns("*.so", "_kernel.c", "__pycache__")
        if source.is_dir():
            shutil.copytree(source, directory / name, ignore=ignore)
        else:
            shutil.copy(source, directory)
    output = str(directory / "dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", output, str(directory)]
    subprocess.run(command, check=True, capture_output=True, cwd=directory, env={**os.environ, **MOMENT})
    [built] = (directory / "dist").glob("*.whl")
    return built


def test_a_wheel_that_is_built_twice_is_the_same_to_the_bit(tmp_path: Path) -> None:
    first, second = build_copy(tmp_path / "one"), build_copy(tmp_path / "a second one")
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        assert not [name for name in archive.namelist() if str(tmp_path).encode() in archive.read(name)]


def test_the_bill_of_materials_lists_every_file_and_its_digest(wheel: Path) -> None:
    done = subprocess.run([sys.executable, ROOT / ".ci/bill-of-materials", wheel], check=True, capture_output=True)
    bill = json.loads(done.stdout)
    listed = {part["name"]: part["hashes"][0]["content"] for part in bill["components"] if part["type"] == "file"}
    with zipfile.ZipFile(wheel) as archive:
        assert listed == {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}
    component = bill["metadata"]["component"]
    assert (component["name"], component["licenses"]) == ("quicsteer", [{"license": {"id": "MIT"}}])
    needed = [
        part for part in bill["components"] if part["type"] == "library" and "extra ==" not in part["description"]
    ]
    assert needed == [], "nothing else is installed with it"


STEER = """
import os, socket, quicsteer
for mode in ("cbpf", "hash", *(["ebpf"] if quicsteer.detect().best_mode == "ebpf" else [])):
    with quicsteer.SteeringGroup.open("127.0.0.1:0", 4, mode=mode) as group:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            for worker in group.workers:
                client.sendto(b"@" + worker.connection_ids.issue(), group.addresses[0])
        for worker in group.workers if mode != "hash" else ():
            worker.socket.setblocking(True)
            worker.socket.settimeout(5)
            assert len(worker.socket.recv(100)) == 9
print("steers")
"""


def other_pythons() -> list[str]:
    """Every CPython from 3.11 on that this host has, by the names that they are installed under."""
    names = [f"python3.{minor}{kind}" for minor in range(11, 20) for kind in ("", "t")]
    folders = [*os.environ["PATH"].split(":"), *map(str, Path.home().glob(".pyenv/versions/*/bin"))]
    found = {
        os.path.realpath(path) for name in names for folder in folders if (path := shutil.which(name, path=folder))
    }
    return sorted(
        path for path in found if subprocess.run([path, "-c", ""], check=False, capture_output=True).returncode == 0
    )


def test_the_wheel_works_in_every_python_that_is_here(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    pythons = other_pythons()
    assert pythons
    for python in pythons:
        environment = {"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"]}
        done = subprocess.run([python, "-c", STEER], capture_output=True, text=True, env=environment, check=False)
        assert done.stdout == "steers\n", f"{python}: {done.stderr}"
    print(*pythons)
