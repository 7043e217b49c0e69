"""The held-out split, decided by a document's text alone."""

import hashlib


def is_heldout(text: str | bytes, fraction: float) -> bool:
    """Tells whether a document belongs to the held-out part.

    The first 64 bits of SHA-256 of the UTF-8 text, read as a fraction of 2**64, fall below
    `fraction`. The answer is the same on every machine, does not depend on the other documents,
    and puts equal texts on the same side, so an exact duplicate never straddles the split.

    Args:
        text: the document's text.
        fraction: expected share held out, in [0, 1].
    """
    data = text.encode() if isinstance(text, str) else text
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") < fraction * 2.0**64
