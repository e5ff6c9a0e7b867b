"""What can go wrong while routing.

RouterError
├── BackboneError          a backbone, its weights, a position or a device cannot be used
├── WrongBackboneError     a task was made for another backbone
├── UnknownTaskError       there is no such task or version
├── TaskError              a task does not fit the backbone's positions or widths, or its tensors are bad
├── ImageError             an image cannot be read, or has the wrong type, shape or size
│   └── TooManyPixelsError     a picture has more pixels than the limit
├── SlotBudgetError        the tasks of one batch do not fit into slot_bytes
├── ClosedError            the router was closed
└── ForkedError            a backbone or router is used in a process that was forked after it was made
"""

from pear_store.errors import PlainError


class RouterError(PlainError):
    """Base of all errors of router. Its text is one line for a person."""


class BackboneError(RouterError):
    """A backbone, its weights, a position or a device cannot be used."""


class WrongBackboneError(RouterError):
    """A task was made for another backbone. It never runs on any but its own."""

    def __init__(self, task: str, expected: str, expected_digest: str, found: str, found_digest: str) -> None:
        super().__init__(
            f"task {task!r} was made for backbone {expected} ({expected_digest[:19]}…), "
            f"this router runs {found} ({found_digest[:19]}…): train it for this one, or use a router with its own"
        )
        self.task, self.expected_digest, self.found_digest = task, expected_digest, found_digest


class UnknownTaskError(RouterError, LookupError):
    """There is no such task or version."""


class TaskError(RouterError):
    """A task does not fit the backbone's positions or widths, or its tensors are bad. `task` is its name."""

    def __init__(self, task: str, problem: str) -> None:
        super().__init__(f"task {task!r}: {problem}")
        self.task = task


class ImageError(RouterError):
    """An image cannot be read, or has the wrong type, shape or size."""


class TooManyPixelsError(ImageError):
    """A picture has more pixels than `max_pixels`. It was not decoded."""

    def __init__(self, name: str, width: int, height: int, max_pixels: int) -> None:
        super().__init__(
            f"{name}: {width} x {height} pixels, the limit is {max_pixels}: if you trust its source, set max_pixels "
            f"(--max-pixels) to at least {height * width}, else make it smaller"
        )
        self.width, self.height, self.max_pixels = width, height, max_pixels


class SlotBudgetError(RouterError):
    """The tasks of one batch, and pinned ones, do not fit into `slot_bytes`."""

    def __init__(self, needed_bytes: int, budget_bytes: int) -> None:
        super().__init__(
            f"the tasks of this batch need {needed_bytes:,} bytes of slots, slot_bytes is {budget_bytes:,}: "
            "raise it, or run fewer tasks at once"
        )
        self.needed_bytes, self.budget_bytes = needed_bytes, budget_bytes


class ClosedError(RouterError):
    """The router was closed."""

    def __init__(self) -> None:
        super().__init__("this router is closed: make another")


class ForkedError(RouterError):
    """A backbone or router is used in a process that was forked after it was made.

    A fork does not copy torch's threads. To wait for them would block for ever.
    """

    def __init__(self, text: str = "") -> None:  # DataLoader makes a worker's error again with a text of its own
        super().__init__(
            text
            or "this process was forked from one that has a router, without its torch threads: start processes by "
            "spawn (multiprocessing.get_context('spawn'), DataLoader(multiprocessing_context='spawn')); a router that "
            "is sent to a spawned process is made anew there"
        )
