"""Headless Chromium by WebDriver, with no library between."""

import base64
import contextlib
import hashlib
import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from quic import TIMEOUT

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


def spki_hash(pem: bytes) -> str:
    """The name of a certificate's key in Chromium's list of those that it shall accept."""
    key = x509.load_pem_x509_certificate(pem).public_key()
    return base64.b64encode(
        hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()
    ).decode()


class Browser:
    """A browser session."""

    def __init__(self, driver: str, arguments: list[str]) -> None:
        self._driver = driver
        options = {"binary": CHROMIUM, "args": arguments}
        capabilities = {"alwaysMatch": {"acceptInsecureCerts": False, "goog:chromeOptions": options}}
        self._session = self._call("POST", "/session", {"capabilities": capabilities})["sessionId"]

    def _call(self, method: str, path: str, content: Any = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self._driver + path, data, {"content-type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=3 * TIMEOUT) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def do(self, method: str, path: str, content: Any = None) -> Any:
        """Send a command of the session."""
        return self._call(method, f"/session/{self._session}{path}", content)

    def open(self, url: str) -> None:
        """Load a page and wait for it."""
        self.do("POST", "/url", {"url": url})

    def run(self, expression: str) -> Any:
        """Return what a promise comes to."""
        script = f"const done = arguments[0]; Promise.resolve({expression}).then(done, error => done(String(error)))"
        return self.do("POST", "/execute/async", {"script": script, "args": []})

    def screenshot(self) -> bytes:
        """The window as PNG."""
        return base64.b64decode(self.do("GET", "/screenshot"))


@contextlib.contextmanager
def browser(directory: Path, certificate: bytes, *arguments: str) -> Iterator[Browser]:
    """Chromium with an empty profile that accepts a certificate and nothing else."""
    assert DRIVER
    with subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as driver:
        try:
            assert driver.stdout
            started = next(
                filter(None, (re.search(r"started successfully on port (\d+)", line) for line in driver.stdout))
            )
            session = Browser(
                f"http://127.0.0.1:{started[1]}",
                [
                    "--headless=new",
                    "--no-sandbox",  # as root it has none
                    "--disable-gpu",
                    "--disable-dev-shm-usage",
                    "--no-first-run",
                    "--window-size=1000,500",
                    f"--user-data-dir={directory / 'profile'}",
                    f"--ignore-certificate-errors-spki-list={spki_hash(certificate)}",
                    *arguments,
                ],
            )
            session.do("POST", "/timeouts", {"script": int(2000 * TIMEOUT)})
            yield session
            session.do("DELETE", "")
        finally:
            driver.terminate()
