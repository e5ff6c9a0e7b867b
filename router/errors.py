"""What can go wrong while routing.

RouterError
├── BackboneError          a backbone, its weights or a position of it that cannot be used
├── WrongBackboneError     a task made for another backbone
├── UnknownTaskError       a task or version that is not there
├── TaskError              a task that does not fit the backbone's positions or widths
├── ImageError             images of a wrong kind, shape or size
│   └── TooManyPixelsError     one that is larger than may be decoded
├── SlotBudgetError        tasks of one batch that do not fit into slot_bytes
├── ClosedError            a router that was closed
└── ForkedError            a router in a process that was forked from the one that made it
"""

from pear_store.errors import PlainError


class RouterError(PlainError):
    """Base of all errors of router; its text is one line for a person."""


class BackboneError(RouterError):
    pass


class WrongBackboneError(RouterError):
    """A task never runs on another backbone than its own."""

    def __init__(self, task: str, expected: str, expected_digest: str, found: str, found_digest: str) -> None:
        super().__init__(
            f"task {task!r} was made for backbone {expected} ({expected_digest[:19]}…), "
            f"this router runs {found} ({found_digest[:19]}…): train it for this one, or use a router with its own"
        )
        self.task, self.expected_digest, self.found_digest = task, expected_digest, found_digest


class UnknownTaskError(RouterError, LookupError):
    pass


class TaskError(RouterError):
    def __init__(self, task: str, problem: str) -> None:
        super().__init__(f"task {task!r}: {problem}")
        self.task = task


class ImageError(RouterError):
    pass


class TooManyPixelsError(ImageError):
    def __init__(self, name: str, width: int, height: int, max_pixels: int) -> None:
        super().__init__(
            f"{name}: {width} x {height} pixels, the limit is {max_pixels}: if you trust where it comes from, give "
            f"max_pixels (--max-pixels) of at least {height * width}, else make it smaller"
        )
        self.width, self.height, self.max_pixels = width, height, max_pixels


class SlotBudgetError(RouterError):
    def __init__(self, needed_bytes: int, budget_bytes: int) -> None:
        super().__init__(
            f"the tasks of this batch need {needed_bytes:,} bytes of slots, slot_bytes is {budget_bytes:,}: "
            "raise it, or send fewer tasks at once"
        )
        self.needed_bytes, self.budget_bytes = needed_bytes, budget_bytes


class ClosedError(RouterError):
    def __init__(self) -> None:
        super().__init__("this router is closed: make another")


class ForkedError(RouterError):
    """torch's threads do not come along when a process is forked: what waits for them waits for ever."""

    def __init__(self, text: str = "") -> None:  # DataLoader hands on what its worker raised by a text of its own
        super().__init__(
            text
            or "this process was forked from one that has a router, and torch's threads did not come along: start "
            "processes by spawn (multiprocessing.get_context('spawn'), DataLoader(multiprocessing_context='spawn')); "
            "a router that is sent there is made anew"
        )
