"""Signals end what is going on, or wait for the loop to act on them."""

import signal
import subprocess
import sys

import pytest

from maxlm.config import MaxlmError
from maxlm.config.errors import PREEMPTED, Preempted
from maxlm.runtime.signals import PREEMPTION_SIGNALS, StopRequest, handle_signals


@pytest.mark.parametrize("number", PREEMPTION_SIGNALS)
def test_a_schedulers_signal_ends_what_is_going_on_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with pytest.raises(Preempted) as error, handle_signals("runs/x"):
        signal.raise_signal(number)
    assert str(error.value) == (
        f"runs/x: preempted ({signal.Signals(number).name}) while no step was under "
        f"way; "
        "run the same command to resume"
    )
    assert isinstance(error.value, MaxlmError)
    assert error.value.exit_code == PREEMPTED == 75
    assert signal.getsignal(number) is before


def test_in_the_loop_they_are_only_written_down():
    with handle_signals("runs/x") as signals:
        with signals.defer_signals():
            assert signals.request == StopRequest.NONE
            for number in (*PREEMPTION_SIGNALS, signal.SIGTERM):
                signal.raise_signal(number)
            assert signals.request == StopRequest.PREEMPT
            signal.raise_signal(signal.SIGINT)
            assert signals.request == StopRequest.PREEMPT | StopRequest.INTERRUPT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert not signals.interrupted_work


def test_one_that_the_loop_did_not_act_on_is_heeded_after_it():
    def told(number):
        with handle_signals("runs/x") as signals:
            with signals.defer_signals():
                signal.raise_signal(number)
            signals.raise_if_signaled()

    with pytest.raises(Preempted, match=r"preempted \(SIGUSR1\)"):
        told(signal.SIGUSR1)
    with pytest.raises(KeyboardInterrupt):
        told(signal.SIGINT)


def test_ctrl_c_outside_the_loop_is_python_s_own():
    with pytest.raises(KeyboardInterrupt), handle_signals("runs/x"):
        signal.raise_signal(signal.SIGINT)


LEAVES_A_SEMAPHORE = """
import os, sys
from multiprocessing import resource_tracker
from maxlm.runtime.signals import start_resource_tracker
start_resource_tracker()
resource_tracker.register("/of-a-worker", "semaphore")
print("error: the reason", file=sys.stderr, flush=True)
os._exit(76)
"""


@pytest.mark.heavy
def test_the_reason_stays_the_last_line_when_workers_leave_something_behind():
    # The tracker holds this pipe too, so that what it says at its end is read.
    command = [sys.executable, "-c", LEAVES_A_SEMAPHORE]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 76
    assert done.stderr.splitlines() == ["error: the reason"]
