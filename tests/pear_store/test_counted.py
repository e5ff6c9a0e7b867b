"""How messages say how many there are."""

from pear_store.counted import counted


def test_one_is_no_plural() -> None:
    assert [counted(number, "task") for number in (0, 1, 2, 1234)] == ["0 tasks", "1 task", "2 tasks", "1,234 tasks"]
    assert [counted(number, "entry", "entries") for number in (1, 2)] == ["1 entry", "2 entries"]
