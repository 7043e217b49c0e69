"""Promise: each program is compiled once, by the thread or by who claimed it, and a
program that is being compiled is waited for."""

import threading

from maxlm.inference.background_compiler import BackgroundCompiler


def test_claimed_programs_are_not_compiled_and_the_current_one_is_waited_for():
    compiled: list[str] = []
    began, may_end, claimed = threading.Event(), threading.Event(), threading.Event()

    def compile_program(name: str) -> None:
        began.set()
        assert may_end.wait(60)
        compiled.append(name)

    def claim_current() -> None:
        compiler.claim("first")
        assert "first" in compiled
        claimed.set()

    compiler = BackgroundCompiler(compile_program, ["first", "second", "third"])
    compiler.start()
    assert began.wait(60)
    compiler.claim("second")
    assert compiler.num_left == 2
    claimer = threading.Thread(target=claim_current)
    claimer.start()
    assert not claimed.wait(0.05)
    may_end.set()
    claimer.join(60)
    assert claimed.is_set()
    compiler.claim(
        "third"
    )  # waits where it is being compiled; takes it off the list elsewhere
    compiler.stop()
    assert compiled in (["first"], ["first", "third"])
    assert compiler.num_left == 0


def test_stopping_leaves_what_has_not_begun():
    began, may_end = threading.Event(), threading.Event()

    def compile_program(name: str) -> None:
        began.set()
        assert may_end.wait(60)

    compiler = BackgroundCompiler(compile_program, ["first", "second"])
    compiler.start()
    assert began.wait(60)
    threading.Timer(0.05, may_end.set).start()
    compiler.stop()
    assert compiler.num_left == 0


def test_a_compiler_that_was_never_started_stops():
    compiler = BackgroundCompiler(lambda name: None, ["first"])
    compiler.stop()
    assert compiler.num_left == 0
