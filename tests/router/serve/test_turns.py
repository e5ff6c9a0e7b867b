"""Lines that take turns."""

from hypothesis import given
from hypothesis import strategies as st

from router.serve.turns import Turns


def drained(turns: Turns[tuple[str, int]]) -> list[tuple[str, int]]:
    found = []
    while (item := turns.first()) is not None:
        turns.take(item[0], item)
        found.append(item)
    return found


def test_a_flood_in_one_line_delays_others_by_one_item_a_turn() -> None:
    turns: Turns[tuple[str, int]] = Turns()
    for i in range(100):
        turns.put("flood", ("flood", i))
    for i in range(2):
        turns.put("a", ("a", i))
        turns.put("b", ("b", i))
    first = [("flood", 0), ("a", 0), ("b", 0), ("flood", 1), ("a", 1), ("b", 1), ("flood", 2)]
    assert list(turns)[:7] == first
    assert drained(turns)[:7] == first


def test_latecomers_are_the_newest_of_the_longest_line() -> None:
    turns: Turns[tuple[str, int]] = Turns()
    assert turns.latecomers(1, 0) == []
    for i in range(5):
        turns.put("flood", ("flood", i))
    turns.put("a", ("a", 0))
    assert (turns.length("flood"), turns.length("a"), turns.length("b")) == (5, 1, 0)
    assert turns.latecomers(2, 2) == [("flood", 4), ("flood", 3)]
    assert turns.latecomers(2, 3) == []


def test_what_is_given_up_is_gone() -> None:
    turns: Turns[tuple[str, int]] = Turns()
    turns.put("a", ("a", 0))
    turns.discard("a", ("a", 0))
    turns.discard("a", ("a", 0))
    turns.discard("b", ("b", 0))
    assert (len(turns), turns.first()) == (0, None)


@given(st.lists(st.sampled_from("abc"), max_size=30))
def test_all_are_served_once_the_oldest_of_a_line_first(lines: list[str]) -> None:
    turns: Turns[tuple[str, int]] = Turns()
    items = [(line, number) for number, line in enumerate(lines)]
    for item in items:
        turns.put(item[0], item)
    assert len(turns) == len(items)
    order = list(turns)
    found = drained(turns)
    assert found == order
    assert sorted(found) == sorted(items)
    for line in "abc":
        mine = [number for name, number in found if name == line]
        assert mine == sorted(mine)
