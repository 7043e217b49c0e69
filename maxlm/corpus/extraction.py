"""Text out of HTML in a process of its own, since nothing else stops C code.

Parsers of HTML can loop, eat all memory or crash, inside C code that holds the interpreter's lock,
where neither signal handlers nor threads get a word in. So a child process reads the pages. The
kernel ends it when a page has used up its processor time, and the page is given up, not the run.
A limit on wall time, which depends on what else the machine does, is for what hangs without any.
"""

import logging
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from maxlm.config import MaxlmError
from maxlm.corpus.pages import ExtractedPage, extract_page, load_parsers

_MEMORY = 4 << 30  # Bytes of address space; what needs more is broken.
_GRACE = 60  # Seconds on the clock for a page, beside 20 for each of processor time.
_CHILD = "import sys; sys.path[:] = {path!r}; import {module} as m; m.serve_extractor{arguments!r}"


class HtmlExtractorProcess:
    """Reads pages in a child process, which starts with the first page and ends with this object.

    Works in any process and thread, daemonic ones included; used by one thread at a time.
    """

    def __init__(self, use_trafilatura: bool, markdown: bool, seconds: float):
        """See `extract_page`; `seconds`: processor time that each way of a page may take."""
        self._ways = [(True, markdown), (False, False)] if use_trafilatura else [(False, False)]
        self._seconds = seconds
        self._child: tuple[subprocess.Popen, Connection] | None = None
        self._end: Callable[[], object] = lambda: None

    def read(self, data: bytes, charset: str | None) -> ExtractedPage:
        """Read a page of HTML, with the charset of its HTTP header. What takes too long or fails in
        one way is tried in the next."""
        page = ExtractedPage("broken")
        for way in self._ways:
            page = self._ask(data, charset, *way)
            if page.status not in ("timeout", "broken"):
                break
        return page

    def close(self) -> None:
        """End the child process."""
        self._end()
        self._child = None

    def _ask(self, *question: Any) -> ExtractedPage:
        process, connection = self._child or self._start()
        try:
            connection.send(question)
            # A second at a time, so that a suspension of both costs it no more than that.
            if not any(connection.poll(1) for _ in range(math.ceil(_GRACE + 20 * self._seconds))):
                process.kill()  # It waits for something, and uses none of its time.
            return connection.recv()
        except (EOFError, OSError):  # The page was its end.
            stopped = process.wait() in (-signal.SIGPROF, -signal.SIGKILL)
            self.close()
            return ExtractedPage("timeout" if stopped else "broken")

    def _start(self) -> tuple[subprocess.Popen, Connection]:
        ours, theirs = socket.socketpair()
        with theirs:
            fd = theirs.fileno()
            arguments = fd, self._seconds, self._ways[0][0]
            code = _CHILD.format(path=sys.path, module=__name__, arguments=arguments)
            process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[fd])
        connection = Connection(ours.detach())
        self._end = weakref.finalize(self, _stop, process, connection)
        try:
            connection.recv()
        except EOFError as error:
            what = f"the process that extracts text does not start (exit {process.wait()})"
            raise MaxlmError(what, fix="see its error above") from error
        self._child = process, connection
        return self._child


def _stop(process: subprocess.Popen, connection: Connection) -> None:
    connection.close()
    process.kill()
    process.wait()


def serve_extractor(fd: int, cpu_seconds: float, use_trafilatura: bool) -> None:
    """Read pages for the process at the other end, until it ends; see `HtmlExtractorProcess`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent decides.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    connection = Connection(fd)
    load_parsers(use_trafilatura)  # Else it is on the first page's time.
    connection.send(os.getpid())
    try:
        while True:
            question = connection.recv()
            signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
            try:
                page = extract_page(*question)
            except Exception:  # The parsers raise what they like; the label says so.
                page = ExtractedPage("broken")
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send(page)
    except (EOFError, ConnectionError):
        pass
