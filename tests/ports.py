"""Ports for what the tests start."""

import random
import socket
from contextlib import suppress

# Linux takes a connection's own port from 32768 on: one of those may be in use a moment
# later.
_PORTS = range(10_240, 32_768)


def free_port() -> int:
    """A port that nothing listens on."""
    while True:
        port = random.SystemRandom().choice(_PORTS)  # tests seed the common one
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
