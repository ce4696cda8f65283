"""Signals that ask a program to leave: SIGINT, SIGTERM, SIGHUP.

The first one ends at once what may be ended at once, lets an update that has begun finish within `GRACE_S` seconds, and
waits for whatever writes. A second one leaves at once: what is on the disk is whole at any moment.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

GRACE_S = 20.0
"""Rented machines are taken back 30 s after SIGTERM or later; the rest is for the checkpoint."""
SAME_S = 1.0
"""`timeout` and some schedulers send one request twice, to the process and to its group: that is one signal."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asked the program to leave. No error: nothing that handles errors may swallow it.

    Args:
        midway: raised inside `Stop.within_grace`: what had begun there is neither undone nor done.
    """

    def __init__(self, number: int, *, midway: bool = False) -> None:
        self.number, self.midway = number, midway
        super().__init__(self.name)

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name

    @property
    def exit_code(self) -> int:
        """The customary one: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.number


class Stop:
    """Whether a signal came, and what it may end."""

    def __init__(self) -> None:
        self.requested: int | None = None
        self._at = 0.0
        self._interruptible = False
        self._timed = False

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises `Stopped` between two operations; one that came before raises it right away."""
        self.check()
        self._interruptible = True
        try:
            self.check()  # one that came between the two lines above
            yield
        finally:
            self._interruptible = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside `at_once`: a signal waits for the end of this block, and then raises `Stopped`."""
        interruptible, self._interruptible = self._interruptible, False
        try:
            yield
        finally:
            self._interruptible = interruptible
        if interruptible:
            self.check()

    @contextlib.contextmanager
    def within_grace(self) -> Iterator[None]:
        """As `deferred`, but `Stopped` is raised `GRACE_S` after the signal if the block takes longer. On other ranks
        it has begun before this one looks, so a signal that came before leaves it its grace as well."""
        with self.deferred():
            self._timed = True
            try:
                if self.requested is not None:
                    signal.setitimer(signal.ITIMER_REAL, GRACE_S)
                yield
            finally:
                self._timed = False
                signal.setitimer(signal.ITIMER_REAL, 0)

    def check(self) -> None:
        """Raises `Stopped` if a signal came."""
        if self.requested is not None:
            raise Stopped(self.requested)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested is not None and now - self._at < SAME_S:
            return
        if self.requested is not None:
            _say(f"\n{signal.Signals(number).name} again: leaving at once\n")
            os._exit(128 + number)
        self.requested, self._at = number, now
        if self._interruptible:
            self.check()
        _say(f"\n{signal.Signals(number).name}: finishing what has begun; once more leaves at once\n")
        if self._timed:
            signal.setitimer(signal.ITIMER_REAL, GRACE_S)

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        if self._timed and self.requested is not None:
            raise Stopped(self.requested, midway=True)


@contextlib.contextmanager
def listening() -> Iterator[Stop]:
    """Signals are heard inside, but for those that the caller's shell set to be ignored (nohup, a background job), and
    handled as before outside. In a thread other than the main one nothing is heard."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    heard = {number: stop._on_signal for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN}
    before = {
        number: signal.signal(number, handler) for number, handler in {**heard, signal.SIGALRM: stop._on_alarm}.items()
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def by_default() -> Iterator[None]:
    """Inside, a signal ends the process as if nobody listened: for a wait in which Python runs no handler. What is
    ignored stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, signal.SIG_DFL) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    """As a signal handler may: past Python's buffers, and where the terminal is gone not at all."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
