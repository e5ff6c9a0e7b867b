"""Work as somebody who is not root."""

import os
from collections.abc import Callable

from tests.helpers.forking import in_child

NOBODY = 65534


def as_nobody(act: Callable[[], object]) -> None:
    """Runs `act` in a child that is no longer root."""

    def run() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        act()

    in_child(run)
