"""An emulated machine that boots a kernel with an initramfs, and what the program in it says."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from debian_kernels import Kernel

EMULATOR = "qemu-system-x86_64"
PATIENCE = 300
"""Seconds for one run; it takes 10 where nothing else runs."""

BOOTS = 3
"""How often a kernel is started that does not reach the program: emulated, some crash while they start."""

_ARGUMENTS = "console=ttyS0 quiet panic=-1 mitigations=off"
_LINE = re.compile(r"QS (\[.*\])\r?$", re.MULTILINE)


class Run(NamedTuple):
    """What the program said, by name of the scenario; all that the console showed; how many starts it took."""

    findings: dict[str, Any]
    console: str
    boots: int

    @property
    def whole(self) -> bool:
        """Whether the program came to its end."""
        return "end" in self.findings


def run(kernel: Kernel, initramfs: Path, *arguments: str, processors: int = 2) -> Run:
    """Boot a kernel and return what the program said until the machine ended, or crashed."""
    for boot in range(1, BOOTS + 1):
        console = _boot(kernel, initramfs, arguments, processors)
        findings = dict(json.loads(line) for line in _LINE.findall(console))
        if findings:
            return Run(findings, console, boot)
        print(f"Linux {kernel} did not start:\n{console[-2000:]}")
    raise AssertionError(f"Linux {kernel} did not start {BOOTS} times")


def _boot(kernel: Kernel, initramfs: Path, arguments: tuple[str, ...], processors: int) -> str:
    command = [
        EMULATOR,
        *("-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(processors), "-m", "1024"),
        *("-nic", "none", "-nographic", "-no-reboot"),
        *("-kernel", str(kernel.image), "-initrd", str(initramfs), "-append", " ".join((_ARGUMENTS, *arguments))),
    ]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE,
        check=True,
        text=True,
        errors="replace",
    )
    return done.stdout
