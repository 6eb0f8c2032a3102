"""Ctrl-C and SIGTERM, heard and obeyed at a moment that suits the run."""

import os
import signal
import threading


class stop_signals:  # noqa: N801 (used like a function)
    """Context in which Ctrl-C and SIGTERM ask for a stop instead of breaking off; a second Ctrl-C breaks off.

    Calling it tells whether a stop was asked for.

    Example:

    >>> with stop_signals() as stopped:
    ...     stopped()
    False
    """

    def __init__(self):
        self.signal: int | None = None
        self._before: dict = {}
        self._process = os.getpid()

    def __enter__(self) -> "stop_signals":
        # Python lets only the main thread set handlers; a run in another thread goes without.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return self.signal is not None

    def _ask(self, number, frame) -> None:
        if os.getpid() != self._process:
            # A fork of the run, as `multiprocessing` makes it, has nothing to finish: it ends when it is told to.
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
            return
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
