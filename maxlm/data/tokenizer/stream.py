"""Text from ids as they arrive, one at a time."""

import codecs

from maxlm.data.tokenizer.interface import Tokenizer


class StreamDecoder:
    """Turns ids into text as soon as whole characters are known.

    All that ``push`` and the final ``flush`` return, joined, is ``tokenizer.decode`` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this id completes: empty inside a character of several tokens.

        Raises:
            MaxlmError: an id outside [0, vocab_size).
        """
        return self._utf8.decode(self._tokenizer.decode_bytes([token_id]))

    def flush(self) -> str:
        """U+FFFD if a character was left unfinished, else nothing; then ready for another text."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest
