"""The ladder of backups, on random times: what must stay stays, however often it is applied."""

from __future__ import annotations

import random

from metasvc.jobs.backups.ladder import DAY_S, HOUR_S, LADDER, Rung, to_remove

NS = 1_000_000_000
BEGIN_S = 1_790_000_000


def slots(made_s: list[int], rung: Rung, now_s: int) -> set[int]:
    """Return the slots of a rung that are wholly within its reach and have a backup."""
    return {made // rung.every_s for made in made_s if made // rung.every_s * rung.every_s >= now_s - rung.for_s}


def test_the_newest_always_stays(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(300):
        made = {f"b{n}": rng.randrange(BEGIN_S, BEGIN_S + 500 * DAY_S) * NS for n in range(rng.randrange(1, 60))}
        now_ns = (BEGIN_S + rng.randrange(0, 3000 * DAY_S)) * NS
        newest = max(made, key=lambda name: (made[name], name))
        assert newest not in to_remove(made, now_ns=now_ns)


def test_each_slot_of_each_rung_that_had_one_keeps_one_however_often_it_is_applied(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        every_s = rng.choice([600, HOUR_S, 5 * HOUR_S, DAY_S, 3 * DAY_S])
        ever: list[int] = []
        there: dict[str, int] = {}
        now_s = BEGIN_S + rng.randrange(7 * DAY_S)
        for number in range(600):
            # Now and then nothing runs for days; sometimes the ladder is applied without a new backup.
            now_s += rng.choice([every_s] * 20 + [40 * DAY_S // 10, 1])
            if rng.random() < 0.9:
                ever.append(now_s)
                there[f"b{number}"] = now_s * NS
            for name in to_remove(there, now_ns=now_s * NS):
                del there[name]
            left = [made // NS for made in there.values()]
            for rung in LADDER:
                assert slots(left, rung, now_s) == slots(ever, rung, now_s), (rung, now_s)


def test_a_year_of_hourly_backups_is_some_hundred() -> None:
    there: dict[str, int] = {}
    for hour in range(400 * 24):
        now_ns = (BEGIN_S + hour * HOUR_S) * NS
        there[f"b{hour}"] = now_ns
        for name in to_remove(there, now_ns=now_ns):
            del there[name]
    assert 24 + 29 + 50 <= len(there) <= 26 + 31 + 53
    assert min(there.values()) <= (BEGIN_S + (400 - 357) * DAY_S) * NS


def test_what_was_made_in_one_hour_becomes_the_first_and_the_newest() -> None:
    begin = BEGIN_S // HOUR_S * HOUR_S
    made = {f"b{n}": (begin + n * 600) * NS for n in range(5)}
    assert to_remove(made, now_ns=(begin + 2400) * NS) == {"b1", "b2", "b3"}


def test_one_from_the_future_and_one_of_equal_time_do_no_harm() -> None:
    made = {"a": BEGIN_S * NS, "b": BEGIN_S * NS, "future": (BEGIN_S + 999 * DAY_S) * NS}
    assert to_remove(made, now_ns=(BEGIN_S + 1) * NS) == {"b"}
    assert to_remove({}, now_ns=1) == set()
