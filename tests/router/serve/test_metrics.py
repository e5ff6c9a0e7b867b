"""Series stay few, whatever is asked."""

from prometheus_client import generate_latest

from router.serve.metrics import TASKS, Metrics


def test_labels_are_bounded() -> None:
    metrics = Metrics()
    for i in range(3 * TASKS):
        metrics.counted("/v1/tasks/{task}/predict", f"unknown{i}", 404, 0.1)
    for i in range(2 * TASKS):
        metrics.counted("/v1/tasks/{task}/predict", f"task{i}@{i}", 200, 0.1)
        metrics.counted("/v1/tasks/{task}/predict", f"task{i}", 400, 0.1)
    text = generate_latest(metrics.registry).decode()
    lines = [line for line in text.splitlines() if line.startswith("pear_requests_total")]
    assert len(lines) == 2 * TASKS + 3
    assert f'status="404",task="other"}} {3 * TASKS}.0' in text
    assert f'status="200",task="other"}} {TASKS}.0' in text
    assert 'status="200",task="task0"} 1.0' in text
    assert "unknown" not in text
