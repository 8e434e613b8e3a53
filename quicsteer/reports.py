"""What workers report about their QUIC connections, added up so that no restart makes a total go backwards.

A worker answers ``report`` with its figures since it started. When its process is gone, the last ones that it
reported are added to the past of its index.
"""

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Any

from .member import Member, State
from .quicstats import QuicStats

PATIENCE = 0.5
"""Seconds that workers have to answer before what they said last is good enough."""


class Reports:
    """The figures of all workers, by index."""

    def __init__(self) -> None:
        self._past: dict[int, QuicStats] = {}
        self._current: dict[int, tuple[int, QuicStats]] = {}
        self._awaited: set[int] = set()
        self._silent: set[int] = set()
        self._news = asyncio.Event()

    def ask(self, members: Iterable[Member]) -> None:
        """Ask workers for their figures."""
        for member in members:
            member.channel.send("report")

    async def refresh(self, members: Iterable[Member]) -> None:
        """Ask workers for their figures and wait for the answers, but not for long.

        Those that are starting, hung or unable to speak are not waited for, nor those that left a question unanswered
        and have not reported since.
        """
        members = list(members)
        self.ask(members)
        self._awaited |= {member.pid for member in members if _answers(member)} - self._silent
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                while self._awaited:
                    self._news.clear()
                    await self._news.wait()
        self._silent |= self._awaited
        self._awaited.clear()

    def take(self, member: Member, figures: Any) -> None:
        """Take note of what a worker reported; what is not figures counts as an answer that says nothing."""
        with contextlib.suppress(ValueError):
            self._current[member.pid] = member.index, QuicStats.from_dict(figures)
        self._silent.discard(member.pid)
        self._heard(member.pid)

    def end(self, member: Member) -> None:
        """Keep what a worker reported whose process is gone."""
        index, figures = self._current.pop(member.pid, (member.index, None))
        if figures:
            self._past[index] = self._past.get(index, QuicStats()) + figures.past()
        self._silent.discard(member.pid)
        self._heard(member.pid)

    def by_index(self) -> dict[int, QuicStats]:
        """Return the figures since the service started, by index of the worker; none of workers that never reported."""
        figures = dict(self._past)
        for index, current in self._current.values():
            figures[index] = figures.get(index, QuicStats()) + current
        return dict(sorted(figures.items()))

    def dump(self) -> dict[str, Any]:
        """Return the figures for the next program of this process."""
        return {
            "past": [[index, figures.to_dict()] for index, figures in self._past.items()],
            "current": [[pid, index, figures.to_dict()] for pid, (index, figures) in self._current.items()],
        }

    def adopt(self, saved: Any) -> None:
        """Go on with the figures of the program before."""
        self._past = {index: QuicStats.from_dict(figures) for index, figures in saved["past"]}
        self._current = {pid: (index, QuicStats.from_dict(figures)) for pid, index, figures in saved["current"]}

    def _heard(self, pid: int) -> None:
        self._awaited.discard(pid)
        if not self._awaited:
            self._news.set()


def _answers(member: Member) -> bool:
    return member.speaks and not member.hung and member.state is not State.STARTING
