"""Debian's cloud kernels, unpacked from their packages: the newest of each series that quicsteer is tested on.

apt finds and checks the packages, with lists of its own in the directory that they go to: nothing of the host changes,
and nothing is installed. Only the image is kept: loopback and an initramfs need no module.
"""

import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SERIES = ("5.10", "6.1", "6.12")
"""The kernels of three Debian releases. The newest one of all is tested besides."""

UNFIXED = "5.10.223"
"""A kernel without the fix for CVE-2026-52910."""

_SUITES = (
    ("debian", "bullseye"),
    ("debian-security", "bullseye-security"),
    ("debian", "bookworm"),
    ("debian", "trixie"),
    ("debian", "trixie-backports"),
)
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_PACKAGE = re.compile(r"linux-(image|binary)-\d+\.\d+\.\d+\S*-cloud-amd64")
_RELEASE = re.compile(r"(\d+)\.(\d+)\.(\d+)-(?!.*~deb)")  # of a Debian release on its own kernel

Release = tuple[int, ...]


class Kernel(NamedTuple):
    """An image and its upstream release."""

    release: Release
    image: Path

    def __str__(self) -> str:
        return ".".join(map(str, self.release))


class _Package(NamedTuple):
    release: Release
    holds_image: bool  # since 7.2 linux-image only names the package that does
    name: str


def fetch(directory: Path) -> list[Kernel]:
    """Return the kernels to test on, from the directory if it has any, else from the archive.

    Raises: subprocess.CalledProcessError when the archive does not answer.
    """
    if not list(read(directory)):
        directory.mkdir(parents=True, exist_ok=True)
        archive = _Archive(directory)
        for package in _choose(archive.packages()):
            archive.unpack(package)
    return sorted(read(directory))


def read(directory: Path) -> Iterator[Kernel]:
    """Yield the kernels that a directory has."""
    for image in directory.glob("vmlinuz-*"):
        yield Kernel(_read_release(image.name.partition("-")[2]), image)


def _read_release(text: str) -> Release:
    return tuple(map(int, text.split(".")))


def _find_archive() -> str:
    """Return where this host's own packages come from, without the name of the distribution behind it."""
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(SITE)"], check=True, capture_output=True, text=True
    )
    return next(
        site.rstrip("/").removesuffix("/debian")
        for site in listed.stdout.split()
        if site.rstrip("/").endswith("/debian")
    )


def _choose(packages: list[_Package]) -> list[_Package]:
    choices = [packages, [package for package in packages if package.release == _read_release(UNFIXED)]]
    choices += [[package for package in packages if package.release[:2] == _read_release(name)] for name in SERIES]
    return [max(choice) for choice in choices if choice]


class _Archive:
    """Debian's archive, by apt with lists of our own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        for path in ("lists/partial", "cache/archives/partial"):
            (directory / path).mkdir(parents=True, exist_ok=True)
        (directory / "status").touch()
        lines = [f"deb [signed-by={_KEYRING}] {_find_archive()}/{archive} {suite} main\n" for archive, suite in _SUITES]
        (directory / "sources.list").write_text("".join(lines))
        self._run("apt-get", "-qq", "update")

    def packages(self) -> list[_Package]:
        found = []
        for paragraph in self._run("apt-cache", "dumpavail").split("\n\n"):
            fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and line[0] != " ")
            name = _PACKAGE.fullmatch(fields.get("Package", ""))
            release = _RELEASE.match(fields.get("Version", ""))
            if name and release:
                found.append(_Package(tuple(map(int, release.groups())), name[1] == "binary", name[0]))
        return found

    def unpack(self, package: _Package) -> None:
        """Download a package and keep its image."""
        self._run("apt-get", "-qq", "download", package.name)
        [file] = self._directory.glob("linux-*.deb")
        with (
            subprocess.Popen(["dpkg-deb", "--fsys-tarfile", file], stdout=subprocess.PIPE) as unpacking,
            tarfile.open(fileobj=unpacking.stdout, mode="r|") as contents,
        ):
            for member in contents:
                image = contents.extractfile(member) if "/vmlinuz" in member.name else None
                if image:
                    name = ".".join(map(str, package.release))
                    (self._directory / f"vmlinuz-{name}").write_bytes(image.read())
        file.unlink()

    def _run(self, tool: str, *arguments: str) -> str:
        settings = {
            "Dir::Etc::sourcelist": self._directory / "sources.list",
            "Dir::Etc::sourceparts": "-",
            "Dir::State::lists": self._directory / "lists",
            "Dir::State::status": self._directory / "status",
            "Dir::Cache": self._directory / "cache",
            "APT::Architecture": "amd64",
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
            "Acquire::Retries": "2",
        }
        options = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
        command = [tool, *options, *arguments]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=self._directory).stdout


if __name__ == "__main__":
    for kernel in fetch(Path(sys.argv[1]).resolve()):
        print(kernel, kernel.image)
