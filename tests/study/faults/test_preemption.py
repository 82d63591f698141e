import os
import signal
import threading

import pytest

from molf.study.faults.preemption import PREEMPTED, STOP_SIGNALS, Preempted, StopRequest, stop_request


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_deferred_signal_is_noted_and_with_nothing_to_save_the_run_ends_at_once(number):
    with pytest.raises(Preempted, match="75") as stopped, stop_request() as stop:
        stop.deferred = True
        os.kill(os.getpid(), number)
        assert stop.received == number.name
        stop.deferred = False
        os.kill(os.getpid(), number)
    assert stopped.value.code == PREEMPTED == os.EX_TEMPFAIL
    assert not isinstance(stopped.value, Exception), "which others might catch"
    assert number.name in stopped.value.message


def test_handlers_come_back():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with stop_request() as stop:
        assert all(signal.getsignal(number) == stop.handle for number in STOP_SIGNALS)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_other_threads_get_no_signals():
    received = []

    def listen():
        with stop_request() as stop:
            received.append(stop.received)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert received == [None]
    assert StopRequest().received is None
