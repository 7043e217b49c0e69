"""Compiling an engine's programs in a thread beside it, while it answers already."""

import threading
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

Key = TypeVar("Key")


class BackgroundCompiler(Generic[Key]):
    """Compiles programs one after the other in a thread of its own.

    Who needs a program before its turn claims it: it leaves the list, and the claimer
    compiles it by running it; a program that is being compiled at that moment is waited
    for instead, so that none is compiled twice.

    Args:
        compile_program: called with one key, in the thread; what it raises ends the
            thread with a traceback, and whoever runs the program meets the same fault.
        keys: names of the programs, those that are needed first in front.
    """

    def __init__(self, compile_program: Callable[[Key], None], keys: Iterable[Key]):
        self._compile_program = compile_program
        self._pending = list(keys)
        self._current: Key | None = None
        self._changed = threading.Condition()
        # No daemon: Python's end would take the interpreter from under a compiler that
        # still runs.
        self._thread = threading.Thread(target=self._compile_all, name="compiler")

    def start(self) -> None:
        """Begins to compile."""
        self._thread.start()

    def stop(self) -> None:
        """Compiles no further program; returns when the current one is done."""
        with self._changed:
            self._pending.clear()
        if self._thread.ident is not None:
            self._thread.join()

    def claim(self, key: Key) -> None:
        """Takes a program off the list; where it is being compiled now, waits until it
        is."""
        with self._changed:
            if key in self._pending:
                self._pending.remove(key)
            self._changed.wait_for(lambda: self._current != key)

    @property
    def num_left(self) -> int:
        """Programs that are not compiled yet, the current one included."""
        with self._changed:
            return len(self._pending) + (self._current is not None)

    def _compile_all(self) -> None:
        while True:
            with self._changed:
                if not self._pending:
                    return
                self._current = self._pending.pop(0)
            is_compiled = False
            try:
                self._compile_program(self._current)
                is_compiled = True
            finally:
                with self._changed:
                    self._current = None
                    if not is_compiled:
                        self._pending.clear()  # steps compile the rest themselves
                    self._changed.notify_all()
