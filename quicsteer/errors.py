"""What can go wrong, as exceptions and one warning."""

import os


class QuicSteerError(Exception):
    """Base class of the errors of this package, except for wrong arguments (``ValueError``, ``TypeError``)."""


class KernelError(QuicSteerError, OSError):
    """The kernel refused a call.

    ``errno`` is the kernel's answer and ``call`` the call it answered; ``detail`` says what it means here.
    """

    call: str
    detail: str

    def __init__(self, errno: int, call: str, detail: str = "") -> None:
        message = f"{call}: {os.strerror(errno)}"
        super().__init__(errno, f"{message}: {detail}" if detail else message)
        self.call = call
        self.detail = detail

    def __reduce__(self) -> tuple[type["KernelError"], tuple[int, str, str]]:
        return (type(self), (self.errno or 0, self.call, self.detail))

    def __str__(self) -> str:
        return str(self.strerror)


class SteeringUnavailable(QuicSteerError):
    """The named mode cannot steer on this host.

    ``mode`` is the mode, ``reason`` the call that failed and why, ``remedy`` what would change that.
    """

    mode: str
    reason: str
    remedy: str

    def __init__(self, mode: str, reason: str, remedy: str = "") -> None:
        super().__init__(f"mode {mode!r} is not available: {reason}" + (f" ({remedy})" if remedy else ""))
        self.mode = mode
        self.reason = reason
        self.remedy = remedy

    def __reduce__(self) -> tuple[type["SteeringUnavailable"], tuple[str, str, str]]:
        return (type(self), (self.mode, self.reason, self.remedy))


class SteeringFallbackWarning(RuntimeWarning):
    """``mode="auto"`` took another than the best mode; the text says which, what failed and what would fix it."""


class ForeignConnectionIdWarning(RuntimeWarning):
    """A server on a steered group seems to issue other connection IDs than the group's; the text says what shows it."""


class ReceiveBufferWarning(RuntimeWarning):
    """The kernel gave less receive buffer than asked for; the text says how much and which sysctl limits it."""
