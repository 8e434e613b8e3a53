"""Retry tokens: good in every worker that has the secret, for their lifetime, whatever key they were made under."""

from itertools import pairwise

import pytest

from quicsteer._stateless import RETRY_LIFETIME, RETRY_ROTATION, RetryTokens

SECRET = bytes(range(32))
ADDRESS = ("192.0.2.7", 50000)
DCID, SCID = b"original", b"retryscid"


def create(now: float, tokens: RetryTokens | None = None) -> bytes:
    return (tokens or RetryTokens(SECRET)).create(ADDRESS, DCID, SCID, now)


@pytest.mark.parametrize("age", [0.0, 1.0, RETRY_LIFETIME - 0.01])
@pytest.mark.parametrize("made", [0.0, 12345.6789, RETRY_ROTATION - 0.5, RETRY_ROTATION])
def test_another_worker_takes_a_token_for_its_lifetime(made: float, age: float) -> None:
    assert RetryTokens(SECRET).validate(create(made), ADDRESS, SCID, made + age) == DCID


@pytest.mark.parametrize("age", [-1.0, RETRY_LIFETIME + 0.01, RETRY_ROTATION])
def test_a_token_is_good_for_no_other_time(age: float) -> None:
    assert RetryTokens(SECRET).validate(create(5000.0), ADDRESS, SCID, 5000.0 + age) is None


def test_keys_rotate_and_tokens_of_the_old_one_stay_good() -> None:
    tokens, other = RetryTokens(SECRET), RetryTokens(SECRET)
    before, after = RETRY_ROTATION * 7 - 1, RETRY_ROTATION * 7 + 1
    old, new = create(before, tokens), create(after, tokens)
    for each in (tokens, other):
        assert each.validate(old, ADDRESS, SCID, after) == DCID
        assert each.validate(new, ADDRESS, SCID, after) == DCID
    keys = [tokens._key(RETRY_ROTATION * period) for period in range(5, 10)]
    assert len(set(keys)) == 5
    assert all(one != two for one, two in pairwise(keys))
    assert len(tokens._keys) <= 2


@pytest.mark.parametrize(
    ("token", "address", "scid"),
    [
        (create(1.0), ("192.0.2.8", 50000), SCID),
        (create(1.0), ("192.0.2.7", 50001), SCID),
        (create(1.0), ADDRESS, b"another"),
        (create(1.0)[:-1], ADDRESS, SCID),
        (create(1.0)[1:], ADDRESS, SCID),
        (b"", ADDRESS, SCID),
        (bytes(16), ADDRESS, SCID),
        (b"\xff" * 40, ADDRESS, SCID),
        (RetryTokens(bytes(32)).create(ADDRESS, DCID, SCID, 1.0), ADDRESS, SCID),
    ],
)
def test_a_token_is_good_for_its_client_and_connection_id_only(
    token: bytes, address: tuple[str, int], scid: bytes
) -> None:
    assert RetryTokens(SECRET).validate(token, address, scid, 2.0) is None
