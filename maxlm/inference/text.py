"""Text from tokens as they come: whole characters, and nothing that may begin a stop string."""

from maxlm.data.tokenizer import StreamDecoder, Tokenizer


class TextStream:
    """Turns a sequence's tokens into text.

    Args:
        continued: whether the text follows other text, rather than opening a document.
        stop_strings: texts that end the output.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: tuple[str, ...], *, continued: bool):
        self._decoder = StreamDecoder(tokenizer, continued=continued)
        self._stop_strings = tuple(filter(None, stop_strings))
        self._held = ""

    def push(self, token_id: int) -> tuple[str, str | None]:
        """Returns the text that is final with one more token, and the stop string that ends it."""
        return self._release(self._decoder.push(token_id), at_end=False)

    def flush(self) -> tuple[str, str | None]:
        """Returns the rest, when no token follows."""
        return self._release(self._decoder.flush(), at_end=True)

    def _release(self, text: str, *, at_end: bool) -> tuple[str, str | None]:
        self._held += text
        found = [(self._held.find(stop), stop) for stop in self._stop_strings]
        found = [(place, stop) for place, stop in found if place >= 0]
        if found:
            place, stop = min(found)
            text, self._held = self._held[:place], ""
            return text, stop
        kept = 0 if at_end else max(map(self._count_begun, self._stop_strings), default=0)
        final = len(self._held) - kept
        text, self._held = self._held[:final], self._held[final:]
        return text, None

    def _count_begun(self, stop: str) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
