# SPDX-License-Identifier: MIT
"""Work for the process's first thread, while ROS spins in another one.

GNU's OpenMP, which PyTorch computes with, counts a program's first thread as one that computes. If
another one does, there seem to be more of them than cores, and those that wait for each other sleep
at once rather than watch for a moment: a third more time for the many short steps of a model.
"""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue
from threading import Event, Lock
from typing import Generic, TypeVar, cast

T = TypeVar("T")


class Work(Generic[T]):
    """A function that the first thread is to run."""

    def __init__(self, function: Callable[[], T], interruptible: bool) -> None:
        self.interruptible = interruptible
        self._function = function
        self._ended = Event()
        self._result: T | None = None
        self._error: Exception | None = None

    def join(self) -> None:
        """Wait until it was run, or never will be."""
        self._ended.wait()

    def result(self) -> T:
        """What the function returned, after waiting for it; what it raised is raised."""
        self.join()
        if self._error is not None:
            raise self._error
        return cast(T, self._result)

    def run(self) -> None:
        """In the first thread. KeyboardInterrupt goes on to it, the waiting one gets an error."""
        self._error = InterruptedError("the process is ending")
        try:
            self._result, self._error = self._function(), None
        except Exception as error:
            self._error = error
        finally:
            self._ended.set()

    def refuse(self) -> None:
        """Never run it."""
        self._error = InterruptedError("the process is ending")
        self._ended.set()


class FirstThread:
    """What other threads hand to the first one, which serves until it is told to end."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        self._closing, self._closed = Lock(), False
        self._current: Work | None = None

    @property
    def interruptible(self) -> bool:
        """Whether a KeyboardInterrupt may end what is run. To be asked in the first thread."""
        return self._current is not None and self._current.interruptible

    def begin(self, function: Callable[[], None]) -> Work[None]:
        """Run ``function``, which ends when it is asked to; the result can be joined."""
        return self._put(Work(function, interruptible=False))

    def call(self, function: Callable[[], T]) -> T:
        """Have ``function`` run, and wait for its result."""
        return self._put(Work(function, interruptible=True)).result()

    def _put(self, work: Work[T]) -> Work[T]:
        with self._closing:
            if self._closed:
                work.refuse()
            else:
                self._queue.put(work)
        return work

    def end(self) -> None:
        """Let the first thread end, after what was handed over before."""
        self._queue.put(None)

    def serve(self) -> None:
        """In the first thread: run what the others hand over, one after the other."""
        try:
            while (work := self._queue.get()) is not None:
                self._current = work
                work.run()
                self._current = work = None  # it holds all that its function knows
        finally:
            if self._current is not None:  # interrupted before it began
                self._current.refuse()
            with self._closing:
                self._closed = True
            while not self._queue.empty():
                work = self._queue.get()
                if work is not None:
                    work.refuse()
