"""Where the messages for the service manager go (sd_notify(3))."""

import socket
from pathlib import Path

import pytest

from quicsteer.notify import ServiceManager


@pytest.mark.parametrize("name", ["notify", "user@1000", "@abstract"])
def test_messages_arrive_at_any_kind_of_address(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An abstract one starts with @; one in a file system may have it anywhere."""
    address = f"@quicsteer-test-{tmp_path}" if name.startswith("@") else str(tmp_path / name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + address[1:] if address.startswith("@") else address)
        manager.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        ServiceManager().ready("all is well")
        assert manager.recv(4096) == b"READY=1\nSTATUS=all is well"


@pytest.mark.parametrize("address", ["", "/nonexistent/notify", "@quicsteer-test-nobody"])
def test_without_a_service_manager_nothing_happens(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    manager = ServiceManager()
    for say in (manager.reloading, manager.stopping, manager.alive):
        say()


def test_a_service_manager_that_does_not_listen_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quicsteer.notify.SEND_TIMEOUT", 0.01)
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        notifier = ServiceManager()
        for _ in range(2000):  # more than any net.unix.max_dgram_qlen that is in use
            notifier.alive()
            if _is_full(address):
                break
        notifier.status("lost")
        assert manager.recv(4096) == b"WATCHDOG=1"


def _is_full(address: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        try:
            sock.sendto(b"", address)
        except BlockingIOError:
            return True
        return False


@pytest.mark.parametrize(
    ("microseconds", "pid", "seconds"),
    [("500000", None, 0.5), ("500000", "1", None), ("", None, None), ("often", None, None)],
)
def test_the_watchdog_is_for_this_process(
    microseconds: str, pid: str | None, seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", microseconds)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    if pid:
        monkeypatch.setenv("WATCHDOG_PID", pid)
    assert ServiceManager().watchdog == seconds
