"""Signals end what is going on, or wait for the loop to act on them."""

import signal

import pytest

from maxlm.config import MaxlmError
from maxlm.config.errors import PREEMPTED, Preempted
from maxlm.data.work.notices import PREEMPTION
from maxlm.train.agreement import Wish
from maxlm.train.notices import noticing


@pytest.mark.parametrize("number", PREEMPTION)
def test_a_schedulers_signal_ends_what_is_going_on_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with pytest.raises(Preempted) as error, noticing("runs/x"):
        signal.raise_signal(number)
    assert str(error.value) == (
        f"runs/x: told to stop ({signal.Signals(number).name}) while no step was under way; "
        "run the same command to go on"
    )
    assert isinstance(error.value, MaxlmError)
    assert error.value.exit_code == PREEMPTED == 75
    assert signal.getsignal(number) is before


def test_what_turns_errors_into_others_lets_a_notice_through():
    def read():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception as error:
            raise ValueError("an unreadable checkpoint") from error

    with pytest.raises(Preempted), noticing("runs/x"):
        read()


def test_in_the_loop_they_are_only_written_down():
    with noticing("runs/x") as notices:
        with notices.held():
            assert notices.wish == Wish.NONE
            for number in (*PREEMPTION, signal.SIGTERM):
                signal.raise_signal(number)
            assert notices.wish == Wish.PREEMPT
            signal.raise_signal(signal.SIGINT)
            assert notices.wish == Wish.PREEMPT | Wish.INTERRUPT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert not notices.at_once


@pytest.mark.parametrize("number", PREEMPTION)
def test_one_that_the_loop_did_not_act_on_is_heeded_after_it(number):
    def told(number):
        with noticing("runs/x") as notices:
            with notices.held():
                signal.raise_signal(number)
            notices.heed()

    with pytest.raises(Preempted, match=rf"told to stop \({signal.Signals(number).name}\)"):
        told(number)
    with pytest.raises(KeyboardInterrupt):
        told(signal.SIGINT)
    with noticing("runs/x") as notices:
        notices.heed()


def test_ctrl_c_outside_the_loop_is_python_s_own():
    with pytest.raises(KeyboardInterrupt), noticing("runs/x"):
        signal.raise_signal(signal.SIGINT)
