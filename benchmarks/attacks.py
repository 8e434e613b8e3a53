"""``attacks``: what somebody who chooses connection IDs, or watches them, gains under each rule."""

import contextlib
import functools
import math
import random
import secrets
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from quicsteer import SteeringUnavailable

from . import rules
from ._libbpf import ProgramUnavailable
from ._native import Arrival
from .lanes import LONG_HEADER, Lane, Path, make_load, send
from .report import RATIO, Bar, Report, Table, first_line
from .rules import LOOPBACK, Rule, Steered

WORKERS = (4, 16)
DCIDS = 100_032
QUICK_DCIDS = 9_984
SEEN = 1000
"""Connection IDs that somebody has seen, of which the forged ones are made."""

SPREAD_LIMIT = 1.15
GUESS_LIMIT = 0.52
TRAINING, TRIALS = 4_000, 10_000
"""Pairs of connection IDs to learn from, and to guess at."""

RULES = (rules.NONE, rules.EBPF, rules.CBPF, rules.ENVOY, rules.NGINX, rules.NGHTTPX, rules.UDPGRM)
"""Not msquic's, which looks at no DCID."""

_OURS = (rules.EBPF, rules.CBPF)
_SIZE = 64
_NAMED_FORMATS = {rules.NONE.name: "8 random bytes", rules.EBPF.name: "quicsteer, 8 bytes"}


class Aim(NamedTuple):
    """What came of datagrams with chosen DCIDs: shares of all, times the number of workers, so that 1 is even."""

    rule: Rule
    workers: int
    against_envoy: float
    forged: float
    repeated: float


def run(path: Path, seed: int, progress: Callable[[str], None] = lambda _: None, quick: bool = False) -> Report:
    """Choose DCIDs, and guess at connection IDs."""
    notes: list[str] = []
    aims = []
    for workers in WORKERS:
        for rule in RULES:
            progress(f"chosen DCIDs: {rule.name}, {workers} workers")
            try:
                aims.append(_aim(rule, workers, QUICK_DCIDS if quick else DCIDS, path))
            except (SteeringUnavailable, ProgramUnavailable) as error:
                notes.append(f"Left out: {rule.name}. {first_line(error)}")
    guesses = _guess_all(seed, progress, notes)
    notes += [
        "Forged: made of a connection ID of one worker that somebody has seen, keeping what the published rule reads; "
        f"{SEEN:,} such connection IDs. A seen one, sent as it is, reaches its worker under every rule that steers.",
        "Repeated: who hashes the DCID alone sends all datagrams with one DCID to one worker, which nobody can choose "
        "without the key. nginx's and udpgrm's rules take the sender's address, so that a client whose address changes "
        "between its Initials starts anew.",
    ]
    return Report(
        "attacks",
        {"dcids": QUICK_DCIDS if quick else DCIDS, "pairs": TRIALS, "seed": seed},
        [_aims_table(aims), _guesses_table(guesses)],
        [*_spread_bars(aims), *_guess_bars(guesses)],
        notes,
    )


def _aim(rule: Rule, workers: int, count: int, path: Path) -> Aim:
    chosen = [
        (secrets.randbelow((1 << 32) // workers) * workers).to_bytes(4) + secrets.token_bytes(4) for _ in range(count)
    ]
    with contextlib.ExitStack() as stack:
        steered = rule.open(stack, LOOPBACK, workers)
        against_envoy = max(_count(steered, chosen, path)) / count * workers
        seen = [steered.issue(0, None) for _ in range(SEEN)]
        forged = [rule.forge(seen[number % SEEN]) for number in range(count)]
        reached = _count(steered, forged, path)[0] / count * workers
        repeated = max(_count(steered, [secrets.token_bytes(8)] * count, path)) / count * workers
    return Aim(rule, workers, against_envoy, reached, repeated)


def _count(steered: Steered, dcids: Sequence[bytes], path: Path) -> list[int]:
    """Send each DCID from an address of its own; return how many each worker got."""
    datagrams = [(LONG_HEADER + bytes([len(dcid)]) + dcid).ljust(_SIZE, b"\0") for dcid in dcids]
    load = make_load(len(datagrams), _SIZE, 1)
    result = send(Lane("", steered, datagrams, Arrival.AT_ANY_SOCKET), path, load.batches)
    return result.counts


def _aims_table(aims: Sequence[Aim]) -> Table:
    columns = (
        "rule",
        "workers",
        "worst, chosen against Envoy's rule",
        "its worker, forged",
        "worst, one DCID repeated",
    )
    rows: list[list[Any]] = [[aim.rule.name, *aim[1:]] for aim in aims]
    return Table(
        "Share of datagrams with chosen DCIDs at one worker; 1 is even, the number of workers is all", columns, rows
    )


def _spread_bars(aims: Sequence[Aim]) -> list[Bar]:
    return [
        Bar(
            f"{aim.rule.name}, {aim.workers} workers: worst worker under DCIDs chosen against Envoy's rule",
            aim.against_envoy,
            SPREAD_LIMIT,
            RATIO,
        )
        for aim in aims
        if aim.rule in _OURS
    ]


class Guess(NamedTuple):
    """Shares of right guesses, a half of which is chance."""

    name: str
    connection: float
    worker: float


Pair = tuple[bytes, bytes, bool]
"""Two connection IDs, and whether they belong together."""


def _guess_all(seed: int, progress: Callable[[str], None], notes: list[str]) -> list[Guess]:
    workers = WORKERS[0]
    guesses = []
    for rule in RULES:
        if rule is rules.CBPF:
            continue  # the same connection IDs as in the mode ebpf
        progress(f"linkability: {rule.name}")
        rng = random.Random(seed)
        try:
            with contextlib.ExitStack() as stack:
                steered = rule.open(stack, LOOPBACK, workers)
                connection = _guess(rule, workers, functools.partial(_pair_of_connections, steered, workers, rng))
                worker = _guess(rule, workers, functools.partial(_pair_of_workers, steered, workers, rng))
        except (SteeringUnavailable, ProgramUnavailable) as error:
            notes.append(f"Left out: {rule.name}. {first_line(error)}")
            continue
        guesses.append(Guess(_NAMED_FORMATS.get(rule.name, f"of {rule.name}"), connection, worker))
    return guesses


def _pair_of_connections(steered: Steered, workers: int, rng: random.Random) -> Pair:
    """Two connection IDs of one connection, or of two."""
    worker, dcid = _open_connection(steered, workers, rng)
    first = steered.issue(worker, dcid)
    same = rng.random() < 0.5
    if not same:
        worker, dcid = _open_connection(steered, workers, rng)
    return first, steered.issue(worker, first if same else dcid), same


def _pair_of_workers(steered: Steered, workers: int, rng: random.Random) -> Pair:
    """Connection IDs of two connections, of one worker or of two."""
    first_worker, first_dcid = _open_connection(steered, workers, rng)
    same = rng.random() < 0.5
    while True:
        worker, dcid = _open_connection(steered, workers, rng)
        if (worker == first_worker) == same:
            return steered.issue(first_worker, first_dcid), steered.issue(worker, dcid), same


def _open_connection(steered: Steered, workers: int, rng: random.Random) -> tuple[int, bytes]:
    """Return a client's DCID, and the worker that it reaches or may reach."""
    dcid = rng.randbytes(8)
    worker = steered.initial(dcid)
    return rng.randrange(workers) if worker is None else worker, dcid


def _guess(rule: Rule, workers: int, make_pair: Callable[[], Pair]) -> float:
    """Return the better one of two guessers: who reads by the published rule, and who has learned which bits agree."""
    learned = _learn([make_pair() for _ in range(TRAINING)])
    pairs = [make_pair() for _ in range(TRIALS)]
    by_rule = by_bits = 0
    for first, second, same in pairs:
        read = rule.read(first, workers)
        by_rule += (read is not None and read == rule.read(second, workers)) == same
        by_bits += (_weigh(first, second, learned) > 0) == same
    return max(by_rule, by_bits) / TRIALS


def _learn(pairs: Sequence[Pair]) -> list[tuple[float, float]]:
    """Return for each bit how much it says that it agrees, or does not, for belonging together (naive Bayes)."""
    bits = 8 * len(pairs[0][0])
    agreements = {True: [1] * bits, False: [1] * bits}
    totals = {True: 2, False: 2}
    for first, second, same in pairs:
        difference = int.from_bytes(first) ^ int.from_bytes(second)
        totals[same] += 1
        counts = agreements[same]
        for bit in range(bits):
            counts[bit] += not difference >> bit & 1
    weights = []
    for bit in range(bits):
        together, apart = (agreements[same][bit] / totals[same] for same in (True, False))
        weights.append((math.log(together / apart), math.log((1 - together) / (1 - apart))))
    return weights


def _weigh(first: bytes, second: bytes, weights: Sequence[tuple[float, float]]) -> float:
    difference = int.from_bytes(first) ^ int.from_bytes(second)
    return sum(weight[difference >> bit & 1] for bit, weight in enumerate(weights))


def _guesses_table(guesses: Sequence[Guess]) -> Table:
    columns = ("connection IDs", "of one connection?", "of one worker?")
    title = f"Right guesses of somebody who sees two connection IDs, {WORKERS[0]} workers; 0.5 is chance"
    return Table(title, columns, [list(guess) for guess in guesses])


def _guess_bars(guesses: Sequence[Guess]) -> list[Bar]:
    ours = _NAMED_FORMATS[rules.EBPF.name]
    return [
        Bar(f"{ours}: right guesses, {what}", value, GUESS_LIMIT, RATIO)
        for guess in guesses
        if guess.name == ours
        for what, value in (("one connection", guess.connection), ("one worker", guess.worker))
    ]
