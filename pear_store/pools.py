"""Pools of threads that go on where the system gives fewer threads than they may have."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class ThreadPool(ThreadPoolExecutor):
    """A pool whose work goes on where the system gives no more threads. The threads that are there do it; where there
    is none, `submit` does it before it returns."""

    _caller = threading.local()
    """Whether the calling thread is to do what it submits"""

    def _adjust_thread_count(self) -> None:  # `submit` calls it under a lock, once the work is in the queue
        try:
            super()._adjust_thread_count()
        except RuntimeError:
            if not self._threads:
                self._work_queue.get_nowait()  # that work: each before it was taken out in the same way
                self._caller.does_it = True

    def submit(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        self._caller.does_it = False
        future = super().submit(work, *args, **kwargs)
        if self._caller.does_it and future.set_running_or_notify_cancel():
            _do(future, lambda: work(*args, **kwargs))
        return future


def _do(future: "Future[T]", work: Callable[[], T]) -> None:
    try:
        result = work()
    except BaseException as error:  # whoever waits is told
        future.set_exception(error)
    else:
        future.set_result(result)
    finally:
        del future  # else it and its error hold each other, and what the error's frames hold
