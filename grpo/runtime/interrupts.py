"""Signals that ask a program to stop: SIGINT, SIGTERM and SIGHUP.

The first signal interrupts what may be interrupted at once, lets an update that has begun finish within
`GRACE_PERIOD_S` seconds, and waits for files being written. A second one ends the process: the files on the disk are
whole at any moment.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

GRACE_PERIOD_S = 20.0
"""Seconds an update may take after a signal. Preemptible machines are stopped 30 s after SIGTERM or later; the rest is
for the checkpoint."""
DUPLICATE_WINDOW_S = 1.0
"""Signals within this many seconds of the first are duplicates: ``timeout`` and some schedulers send one request to the
process and to its group."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asked the program to stop. Not an error, so that no handler of errors swallows it.

    Args:
        midway: raised inside `Interrupts.within_grace`: what began there is neither undone nor done.
    """

    def __init__(self, number: int, *, midway: bool = False) -> None:
        self.number, self.midway = number, midway
        super().__init__(self.name)

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name

    @property
    def exit_code(self) -> int:
        """The usual exit code: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.number


class Interrupts:
    """Whether a signal was received, and what it may interrupt."""

    def __init__(self) -> None:
        self.requested: int | None = None
        self._at = 0.0
        self._interruptible = False
        self._timed = False

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Context in which a signal raises `Interrupted` between two operations; an earlier one raises it on entry."""
        self.raise_if_requested()
        self._interruptible = True
        try:
            self.raise_if_requested()  # received between the two lines above
            yield
        finally:
            self._interruptible = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Context inside `at_once` that a signal does not interrupt: `Interrupted` is raised at its end."""
        interruptible, self._interruptible = self._interruptible, False
        try:
            yield
        finally:
            self._interruptible = interruptible
        if interruptible:
            self.raise_if_requested()

    @contextlib.contextmanager
    def within_grace(self) -> Iterator[None]:
        """Like `deferred`, but `Interrupted` is raised `GRACE_PERIOD_S` after the signal if the block takes longer. A
        signal received before entering also starts the grace period, because other ranks may already be inside."""
        with self.deferred():
            self._timed = True
            try:
                if self.requested is not None:
                    signal.setitimer(signal.ITIMER_REAL, GRACE_PERIOD_S)
                yield
            finally:
                self._timed = False
                signal.setitimer(signal.ITIMER_REAL, 0)

    def raise_if_requested(self) -> None:
        """Raise `Interrupted` if a signal was received."""
        if self.requested is not None:
            raise Interrupted(self.requested)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        if self.requested is not None:
            if now - self._at < DUPLICATE_WINDOW_S:
                return
            _write_stderr(f"\nsecond {name}: quitting now\n")
            os._exit(128 + number)
        self.requested, self._at = number, now
        if self._interruptible:
            self.raise_if_requested()
        task = f"the current update (up to {GRACE_PERIOD_S:.0f} s)" if self._timed else "the current operation"
        _write_stderr(f"\n{name}: finishing {task}; send it again to quit immediately\n")
        if self._timed:
            signal.setitimer(signal.ITIMER_REAL, GRACE_PERIOD_S)

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        if self._timed and self.requested is not None:
            raise Interrupted(self.requested, midway=True)


@contextlib.contextmanager
def handle_signals() -> Iterator[Interrupts]:
    """Context that handles the signals, except those that are ignored already (nohup, a background job). In a thread
    other than the main one no signal is handled."""
    stop = Interrupts()
    handlers: dict[int, Any] = dict.fromkeys(SIGNALS, stop._on_signal)
    with _handlers(handlers | {signal.SIGALRM: stop._on_alarm}):
        yield stop


@contextlib.contextmanager
def default_handlers() -> Iterator[None]:
    """Context in which a signal ends the process: for a wait during which Python runs no handler."""
    with _handlers(dict.fromkeys(SIGNALS, signal.SIG_DFL)):
        yield


@contextlib.contextmanager
def _handlers(handlers: Mapping[int, Callable[[int, FrameType | None], Any] | signal.Handlers]) -> Iterator[None]:
    """In the main thread, install handlers for signals that are not ignored; restore the previous ones at the end."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        listed = [n for n in handlers if n == signal.SIGALRM or signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, handlers[number]) for number in listed}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write_stderr(text: str) -> None:
    """Write as a signal handler may: without Python's buffers, and ignoring a terminal that is gone."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
