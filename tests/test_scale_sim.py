"""benchmarks/scale_sim.py where the answer is known, and its ring beside nginx's own."""

from typing import Any

import numpy as np
import pytest

from benchmarks.scale_sim import Fleet, Policy, Ring, che_hits, popularity, simulate
from tests.helpers.proxies import nginx, replicas

NAMES = [f"task-{number}" for number in range(200)]


def test_one_at_a_time_waits_as_long_as_in_an_m_d_1_queue() -> None:
    fleet = Fleet(1, slots=1, max_batch=1, batch_s=0.01, row_s=0.0)
    for load in (0.3, 0.7):
        found = simulate(fleet, np.ones(1), load / 0.01, 150_000, "round robin")
        expected_ms = 1000 * load * 0.01 / (2 * (1 - load))
        assert found.mean_wait_ms == pytest.approx(expected_ms, rel=0.05)
        assert found.busy == pytest.approx(load, rel=0.02)


def test_hits_are_those_of_che_s_approximation() -> None:
    assert che_hits(np.full(50, 1 / 50), 10) == pytest.approx(10 / 50)  # exact: all tasks alike
    assert che_hits(popularity(50, 1.0), 50) == 1
    shares = popularity(1000, 0.9)
    cases: tuple[tuple[int, Policy], ...] = ((1, "round robin"), (4, "round robin"), (4, "least loaded"))
    for count, policy in cases:
        found = simulate(Fleet(count, slots=100), shares, 100, 60_000, policy)
        assert found.hits == pytest.approx(che_hits(shares, 100), abs=0.01), policy
    names = [f"task-{number}" for number in range(1000)]
    ring = Ring([f"replica-{number}:8090" for number in range(4)])
    homes = np.array([ring.server(name) for name in names])
    mine = [shares[homes == number] for number in range(4)]
    expected = sum(che_hits(part, 100) * part.sum() for part in mine)
    found = simulate(Fleet(4, slots=100), shares, 100, 60_000, "hash")
    assert found.hits == pytest.approx(expected, abs=0.01)
    assert found.hits > che_hits(shares, 100) + 0.2
    assert found.busiest == pytest.approx(max(part.sum() for part in mine) * 4, rel=0.03)


def test_a_lone_request_for_a_task_that_is_not_loaded_takes_its_loading_and_its_batch() -> None:
    fleet = Fleet(1, slots=1, batch_s=0.004, row_s=0.001, load_s=0.05)
    found = simulate(fleet, np.full(1000, 1 / 1000), 0.1, 2000, "hash")
    assert found.hits < 0.01
    assert found.p50_ms == pytest.approx(1000 * (0.05 + 0.004 + 0.001))
    warm = simulate(fleet, np.ones(1), 0.1, 2000, "hash")
    assert (warm.hits, warm.misses_a_second) == (1, 0)
    assert warm.p50_ms == pytest.approx(1000 * (0.004 + 0.001))


def test_batches_grow_with_the_load_and_no_further() -> None:
    fleet = Fleet(1, slots=1, max_batch=8, batch_s=0.01, row_s=0.001)  # at most 8 in 18 ms: 444 a second
    at_most = simulate(fleet, np.ones(1), 400, 40_000, "hash")
    assert at_most.p99_ms < 200
    beyond = simulate(fleet, np.ones(1), 600, 40_000, "hash")
    assert beyond.p99_ms > 5000, "more than the device can do"


def test_bounds_keep_a_popular_task_from_one_replica_alone() -> None:
    shares = popularity(300, 1.2)
    given: dict[str, Any] = {"rate": 3000.0, "requests": 40_000}
    fleet = Fleet(8, slots=100, max_batch=16)
    plain = simulate(fleet, shares, policy="hash", **given)
    assert plain.busiest > 1.5
    cases: tuple[tuple[Policy, Fleet, Fleet], ...] = (
        ("hash, max_conns", Fleet(8, 100, 16, max_conns=10**6), Fleet(8, 100, 16, max_conns=4)),
        ("hash, of the mean", Fleet(8, 100, 16, factor=100), Fleet(8, 100, 16, factor=1.25)),
    )
    for policy, loose, tight in cases:
        assert simulate(loose, shares, policy=policy, **given) == plain
        bounded = simulate(tight, shares, policy=policy, **given)
        assert bounded.busiest < 0.8 * plain.busiest
        assert bounded.hits < plain.hits
    in_turn = simulate(fleet, shares, policy="round robin", **given)
    assert in_turn.busiest == pytest.approx(1, abs=0.001)


def test_the_same_seed_gives_the_same_figures() -> None:
    first, again, other = (
        simulate(Fleet(3, 20), popularity(100, 1.0), 500, 5000, "least loaded", seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_the_ring_is_nginx_s() -> None:
    with replicas(5) as made, nginx([one.port for one in made]) as front, front.client() as client:
        ring = Ring([f"127.0.0.1:{one.port}" for one in made])
        for name in NAMES:
            answer = client.post(f"/v1/tasks/{name}/predict")
            assert int(answer.headers["X-Replica"]) == made[ring.server(name)].port, name
