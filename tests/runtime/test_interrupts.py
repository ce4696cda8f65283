"""What a signal ends, when, and with which exit code; the second one is in tests/support/faults.py, which it would
end."""

import os
import signal
import threading
import time

import pytest

from grpo.runtime import interrupts as stop_module
from grpo.runtime.interrupts import SIGNALS, Interrupted, default_handlers, handle_signals


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_what_may_end_at_once_does(number: int, code: int) -> None:
    reached = []
    with pytest.raises(Interrupted) as told, handle_signals() as stop, stop.at_once():
        send(number)
        time.sleep(5)
        reached.append("the end")
    assert told.value.exit_code == code and not told.value.midway and not reached
    assert not isinstance(told.value, Exception), "`except Exception` must not swallow it"


def test_what_writes_is_waited_for_and_what_comes_next_is_not_begun() -> None:
    done = []
    with handle_signals() as stop:
        send()
        done.append("written")
        with pytest.raises(Interrupted), stop.at_once():
            done.append("begun")
    assert done == ["written"]


def test_what_has_begun_has_its_grace_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    with handle_signals() as stop:
        with stop.within_grace():
            send()
            time.sleep(0.05)
        with pytest.raises(Interrupted):
            stop.raise_if_requested()
    monkeypatch.setattr(stop_module, "GRACE_PERIOD_S", 0.05)
    started = time.monotonic()
    with pytest.raises(Interrupted) as told, handle_signals() as stop, stop.within_grace():
        send()
        while time.monotonic() - started < 10:
            time.sleep(0.01)
    assert told.value.midway and time.monotonic() - started < 5


def test_a_signal_that_came_before_leaves_what_others_began_its_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_module, "GRACE_PERIOD_S", 0.2)
    done = []
    with handle_signals() as stop:
        send()
        with stop.within_grace():
            done.append("finished")
        started = time.monotonic()
        with pytest.raises(Interrupted) as told, stop.within_grace():
            while time.monotonic() - started < 10:
                time.sleep(0.01)
    assert done == ["finished"] and told.value.midway and 0.1 < time.monotonic() - started < 5


def test_the_grace_ends_with_what_it_was_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_module, "GRACE_PERIOD_S", 0.05)
    with handle_signals() as stop:
        with stop.within_grace():
            send()
        time.sleep(0.2)  # a save: nothing may break into it
        assert stop.requested == signal.SIGTERM


def test_one_request_that_comes_twice_is_one() -> None:
    with handle_signals() as stop:
        send()
        send()  # as `timeout` does
        assert stop.requested == signal.SIGTERM


def test_handlers_are_put_back_and_ignored_signals_stay_ignored() -> None:
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with handle_signals() as stop:
            send(signal.SIGHUP)
            assert stop.requested is None and signal.getsignal(signal.SIGTERM) == stop._on_signal
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])
    assert before == {number: signal.getsignal(number) for number in before}


def test_where_python_runs_no_handler_a_signal_ends_the_process() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with default_handlers():
            assert [signal.getsignal(number) for number in SIGNALS[:2]] == [signal.SIG_DFL] * 2
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert before == {number: signal.getsignal(number) for number in SIGNALS}
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_in_another_thread_nothing_is_heard() -> None:
    heard = []

    def inside() -> None:
        with handle_signals() as stop, stop.at_once():
            heard.append(stop.requested)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert heard == [None]
