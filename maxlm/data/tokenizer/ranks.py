"""Byte-level BPE by ranks: tiktoken in place of Hugging Face tokenizers, where both give the same.

tiktoken merges the two neighbours whose joined bytes have the lowest rank, whichever they are;
tokenizers merges the pair that comes first in a list. Both split a text by a pattern first. They
agree on every text if (1) the list is in order of the tokens that it makes, and (2) the list turns
each token's own bytes into that token: a stretch of text that no merge has crossed so far is then
in the state that its bytes alone would be in, so the only two neighbours ever to be found for a
token are those of its rule. Both are checked here, token by token; whatever does not pass, or is
written in a pattern not known here, stays with tokenizers. tiktoken is 5 to 10 times as fast.
"""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from maxlm.data.tokenizer.patterns import known_pattern
from maxlm.data.tokenizer.pieces import byte_alphabet
from maxlm.runtime.threads import thread_count

if TYPE_CHECKING:
    from tiktoken import Encoding

# In such text NFC changes nothing: no character decomposes for good, none joins the one before.
_MAY_CHANGE = re.compile("[^\0-\u02ff\u2002-\u20cf\u4e00-\u9fff]")
# tiktoken's regular expressions remember each place of a run of blanks, up to a million.
_RUN = 10_000
# Finding literals of added tokens takes a pass over the text for each.
_MAX_LITERALS = 32
_CHUNK_CHARS = 65_536
FAST_CHARS = 65_536


class SegmentEncoder:
    """The ids of ordinary text by one tokenizer.json: by tiktoken where that is known to be right.

    Args:
        library: a ``tokenizers.Tokenizer`` of it, told not to look for special tokens.
        data: the file.
    """

    def __init__(self, library: Any, data: bytes):
        self._library = library
        self._data = data
        self._ranks: _Ranks | None = None
        self._tried = False

    def __call__(self, segments: list[str]) -> list[list[int]]:
        # To check and build it takes a second for 200,000 tokens: not for a prompt or two.
        if not self._tried and sum(map(len, segments)) >= FAST_CHARS:
            self._ranks = _open_ranks(self._library, json.loads(self._data))
            self._tried = True
        if self._ranks is None:
            return library_ids(self._library, segments)
        taken = [self._ranks.takes(text) for text in segments]
        fast = self._ranks.encode([text for text, ok in zip(segments, taken, strict=True) if ok])
        if all(taken):
            return fast
        left = [text for text, ok in zip(segments, taken, strict=True) if not ok]
        ids = iter(fast), iter(library_ids(self._library, left))
        return [next(ids[0 if ok else 1]) for ok in taken]


def library_ids(library: Any, segments: list[str]) -> list[list[int]]:
    """The ids that ``tokenizers`` gives."""
    # The batch call starts a thread pool, which a later fork would then have to do without.
    if len(segments) == 1:
        return [library.encode(segments[0], add_special_tokens=False).ids]
    encodings = library.encode_batch_fast(segments, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


@dataclass(frozen=True)
class _Ranks:
    encoding: "Encoding"
    literals: list[str]
    """Of added tokens that are looked for in text."""
    composes: bool
    """Whether text is brought into NFC first."""

    def takes(self, text: str) -> bool:
        return not (
            any(literal in text for literal in self.literals)
            or (self.composes and not text.isascii() and _MAY_CHANGE.search(text))
            or _has_long_run(text)
        )

    def encode(self, texts: list[str]) -> list[list[int]]:
        encode = self.encoding.encode_ordinary
        threads = thread_count()
        chunks = list(_chunks(texts)) if threads > 1 else []
        if len(chunks) < 2:
            return [encode(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            done = pool.map(lambda chunk: [encode(text) for text in chunk], chunks)
            return [ids for part in done for ids in part]


def _open_ranks(library: Any, spec: dict[str, Any]) -> _Ranks | None:
    """The fast way for a tokenizer.json, if there is one."""
    pattern = known_pattern(spec.get("pre_tokenizer"))
    normalizer = spec.get("normalizer")
    composes = normalizer is not None and normalizer["type"] == "NFC"
    added = library.get_added_tokens_decoder().values()
    literals = [token.content for token in added if not token.special]
    if (
        pattern is None
        or (normalizer is not None and not composes)
        or len(literals) > _MAX_LITERALS
        or not all(map(str.isascii, literals))
    ):
        return None
    special = {token.content for token in added if token.special}
    ranks = _checked_ranks(library.model, spec["model"], special)
    if ranks is None:
        return None
    from tiktoken import Encoding

    # The same pattern, with all that needs no look ahead in one group: the regular expressions'
    # compiler then makes one automaton of it, twice as fast.
    head, blanks, rest = pattern.rsplit("|", 2)
    pattern = f"(?:{head})|{blanks}|{rest}"
    encoding = Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return _Ranks(encoding, literals, composes)


def _checked_ranks(
    merging: Any, model: dict[str, Any], special: set[str]
) -> dict[bytes, int] | None:
    """Each token's bytes and id, if ids are ranks in the sense of the module's docstring.

    Args:
        merging: the library's ``models.BPE``.
        model: its part of the file.
        special: literals that no text may give.
    """
    vocab: dict[str, int] = model["vocab"]
    odd = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if not isinstance(vocab, dict) or "merges" not in model or any(map(model.get, odd)):
        return None
    alphabet = byte_alphabet()
    made: dict[str, int] = {}
    last = -1
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        rank = vocab[left + right]
        if rank < last:
            return None
        made[left + right] = last = rank
    if not made.keys().isdisjoint(special) or not all(char in vocab for char in alphabet):
        return None
    # A word that is a token as it stands needs no merge in such a tokenizer.
    if model.get("ignore_merges") and vocab.keys() - made.keys() - {*alphabet} - special:
        return None
    merging.ignore_merges = False
    try:
        if any([piece.id for piece in merging.tokenize(text)] != [i] for text, i in made.items()):
            return None
    finally:
        merging.ignore_merges = bool(model.get("ignore_merges"))
    of_char = {char: byte for byte, char in enumerate(alphabet)}
    made |= {char: vocab[char] for char in alphabet}
    return {bytes(of_char[char] for char in token): i for token, i in made.items()}


def _has_long_run(text: str) -> bool:
    """Whether there is a run of 2 * _RUN blanks; maybe True from _RUN on."""
    places = range(0, len(text) - _RUN, _RUN)
    return any(text[i].isspace() and text[i : i + _RUN].isspace() for i in places)


def _chunks(texts: list[str]) -> Iterator[list[str]]:
    """Texts in groups worth a thread's while."""
    start = size = 0
    for i, text in enumerate(texts, 1):
        size += len(text)
        if size >= _CHUNK_CHARS:
            yield texts[start:i]
            start, size = i, 0
    if start < len(texts):
        yield texts[start:]
