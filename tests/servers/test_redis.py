"""Redis runs where the tests find it, keeps what it acknowledged, and ends by its pid."""

from __future__ import annotations

import asyncio

import pytest
from redis.exceptions import AuthenticationError, MovedError
from redis.exceptions import TimeoutError as RedisTimeoutError

from tests.servers.redis import Redis, RedisAt, redis_cluster
from tests.servers.redis_proxy import Fault, RedisProxy


def test_a_server_keeps_its_port_and_data_over_kill_and_shutdown(own_redis: Redis) -> None:
    port = own_redis.port
    own_redis.command("SET", "a", 7)
    for end in (own_redis.kill, own_redis.stop):
        end()
        with pytest.raises(ProcessLookupError):
            _ = own_redis.pid
        own_redis.start()
        assert own_redis.port == port
        assert own_redis.command("GET", "a") == b"7"


def test_a_paused_server_answers_when_it_goes_on(own_redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.servers.redis._READY_S", 0.5)
    with own_redis.paused(), pytest.raises(RedisTimeoutError):
        own_redis.command("PING")
    assert own_redis.command("PING") == b"PONG"


def test_nobody_comes_in_without_the_password(own_redis: Redis) -> None:
    for user, password in (("default", "x"), (own_redis.user, "x")):
        with pytest.raises(AuthenticationError):
            RedisAt(own_redis.host, own_redis.port, user=user, password=password).command("PING")


def test_a_replica_follows(own_redis: Redis) -> None:
    own_redis.command("SET", "a", 1)
    with own_redis.replica() as replica:
        assert replica.command("GET", "a") == b"1"
        own_redis.command("SET", "a", 2)
        assert own_redis.command("WAIT", 1, 30_000) == 1
        assert replica.command("GET", "a") == b"2"


def test_a_cluster_shares_the_slots() -> None:
    with redis_cluster() as nodes:
        answers = []
        for node in nodes:
            try:
                answers.append(node.command("SET", "a", 1))
            except MovedError as exc:
                answers.append(exc.port)
        (home,) = [node.port for node, answer in zip(nodes, answers, strict=True) if answer == b"OK"]
        assert sorted(answers, key=str) == sorted([b"OK", home, home], key=str)


async def test_a_proxy_cuts_where_it_is_told(redis: RedisAt) -> None:
    script = b"return redis.call('INCR', KEYS[1])"
    key = redis.new_prefix().encode()
    command = b"".join([b"*4\r\n", *(b"$%d\r\n%b\r\n" % (len(part), part) for part in (b"EVAL", script, b"1", key))])
    login = b"AUTH %b %b\r\n" % (redis.user.encode(), redis.password.encode())

    async def run(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        parts = login.split()
        writer.write(b"*3\r\n" + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts))
        assert await reader.readline() == b"+OK\r\n"
        writer.write(command)
        answer = await reader.read(100)
        writer.close()
        return answer

    async with RedisProxy(redis.port) as proxy:
        counted = 0
        for fault, is_run, answer in (
            (Fault.NOT_SENT, False, b""),
            (Fault.HALF_SENT, False, b""),
            (Fault.ANSWER_LOST, True, b""),
            (Fault.HALF_ANSWER, True, b":4"),
            (None, True, b""),
        ):
            if fault is not None:
                proxy.plan(script, fault)
            got = await run(proxy.port)
            counted += is_run
            assert int(redis.command("GET", key) or 0) == counted
            if fault is Fault.HALF_ANSWER:
                assert got == b":%d\r\n"[:1] + b"%d" % counted
            elif fault is None:
                assert got == b":%d\r\n" % counted
            else:
                assert got == answer
        proxy.plan(script, Fault.LATE)
        assert await run(proxy.port) == b""
        assert int(redis.command("GET", key)) == counted
        await proxy.let_go()
        assert int(redis.command("GET", key)) == counted + 1
    redis.command("DEL", key)
