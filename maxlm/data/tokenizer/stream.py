"""Text from ids as they arrive, one at a time."""

import codecs

from maxlm.data.tokenizer.codec import Tokenizer


class StreamDecoder:
    """Turns ids into text as soon as whole characters are known.

    All that ``push`` and the final ``flush`` return, joined, is ``tokenizer.decode`` of all ids.

    Args:
        continued: the ids go on after others, such as a prompt's (see ``Tokenizer.decode_bytes``).
    """

    def __init__(self, tokenizer: Tokenizer, *, continued: bool = False):
        self._tokenizer = tokenizer
        self._continued = self._within = continued
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this id completes: empty inside a character of several tokens.

        Raises:
            MaxlmError: an id outside [0, vocab_size).
        """
        data = self._tokenizer.decode_bytes([token_id], continued=self._within)
        if not self._within:
            # An id without a token says nothing: the text has not begun.
            self._within = self._tokenizer.decode_bytes([token_id], continued=True) != b""
        return self._utf8.decode(data)

    def flush(self) -> str:
        """U+FFFD if a character was left unfinished, else nothing; then ready for another text."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        self._within = self._continued
        return rest
