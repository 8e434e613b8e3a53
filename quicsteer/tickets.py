"""TLS session tickets that every worker of a group accepts, each once.

aioquic draws a random name for a ticket and leaves it to its user to keep what belongs to it. Kept in one process, a
ticket is worth nothing to the client whose next connection is dispatched to another worker: with four of them, three
in four resumptions fall back to a full handshake, and their 0-RTT data is lost. Here what belongs to it lies in the
group's shared store, sealed under a key that only the ticket itself and the group's secret make: memory alone, swapped
out or dumped, opens nothing.

A ticket is good once (RFC 8446, 8.1, single-use tickets), across workers, reloads and crashes: so early data that was
recorded cannot be played again.
"""

import datetime
import hashlib
import json
from typing import Any

from .worker import Worker

LIFETIME = 24 * 3600.0
"""Seconds that a ticket is kept, at most; aioquic tells clients as much."""

_NONCE = bytes(12)  # each key is used once


class SessionTickets:
    """The tickets of a worker's group, as aioquic's two callbacks: ``session_ticket_handler`` and ``..._fetcher``.

    ``lifetime`` is in seconds, at most a day.
    """

    def __init__(self, worker: Worker, lifetime: float = LIFETIME) -> None:
        from aioquic.tls import CipherSuite, SessionTicket
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        if not 0 < lifetime <= LIFETIME:
            raise ValueError(f"lifetime is {lifetime!r}, it must be more than 0 and at most {LIFETIME:g} seconds")
        self._cipher, self._invalid = AESGCM, InvalidTag
        self._ticket, self._suite = SessionTicket, CipherSuite
        self._store = worker.store
        self._secret = worker.token_secret
        self._lifetime = lifetime

    def callbacks(self) -> dict[str, Any]:
        """Return both callbacks under their names in aioquic, as arguments."""
        return {"session_ticket_handler": self.keep, "session_ticket_fetcher": self.take}

    def keep(self, ticket: Any) -> None:
        """Keep a new ticket: the ``session_ticket_handler``."""
        key = self._key(ticket.ticket)
        plain = json.dumps(_dump(ticket), separators=(",", ":")).encode()
        self._store.put(ticket.ticket, self._cipher(key).encrypt(_NONCE, plain, None), self._lifetime)

    def take(self, name: bytes) -> Any:
        """Return a ticket that a client brings, once, or ``None``: the ``session_ticket_fetcher``."""
        sealed = self._store.take(name)
        if sealed is None:
            return None
        try:
            plain = self._cipher(self._key(name)).decrypt(_NONCE, sealed, None)
        except self._invalid:
            return None
        return self._load(name, json.loads(plain))

    def _key(self, name: bytes) -> bytes:
        return hashlib.blake2b(name, key=self._secret, person=b"session ticket", digest_size=32).digest()

    def _load(self, name: bytes, plain: dict[str, Any]) -> Any:
        return self._ticket(
            age_add=plain["age_add"],
            cipher_suite=self._suite(plain["suite"]),
            not_valid_after=_moment(plain["until"]),
            not_valid_before=_moment(plain["from"]),
            resumption_secret=bytes.fromhex(plain["secret"]),
            server_name=plain["name"],
            ticket=name,
            max_early_data_size=plain["early"],
            other_extensions=[(kind, bytes.fromhex(data)) for kind, data in plain["extensions"]],
        )


def _dump(ticket: Any) -> dict[str, Any]:
    return {
        "age_add": ticket.age_add,
        "suite": int(ticket.cipher_suite),
        "from": ticket.not_valid_before.timestamp(),
        "until": ticket.not_valid_after.timestamp(),
        "secret": ticket.resumption_secret.hex(),
        "name": ticket.server_name,
        "early": ticket.max_early_data_size,
        "extensions": [[kind, data.hex()] for kind, data in ticket.other_extensions],
    }


def _moment(timestamp: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(timestamp, datetime.UTC)
