"""A child process under another identity, for the tests that ask what a server without privileges can do."""

import os
from collections.abc import Callable
from typing import Any, NoReturn

import privileges
import pytest

from quicsteer.capability import read_host


@pytest.fixture
def run_as() -> Callable[..., Any]:
    """``privileges.run_as``; where the identity cannot be had the test is skipped, or fails if it may not skip."""
    host = read_host()
    if os.geteuid() != 0 or not host.capable or host.user_namespace:
        _give_up("only root with CAP_BPF, outside of user namespaces, can take every identity")

    def run(source: str, **identity: Any) -> Any:
        try:
            return privileges.run_as(source, **identity)
        except privileges.CannotBecome as refused:
            _give_up(str(refused))

    return run


def _give_up(reason: str) -> NoReturn:
    if os.environ.get("QUICSTEER_REQUIRE_KERNEL") == "1":
        pytest.fail(reason)
    pytest.skip(reason)
