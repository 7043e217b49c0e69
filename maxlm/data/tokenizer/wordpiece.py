"""Training WordPiece (Schuster and Nakajima, 2012) as BERT has it.

The library's own WordPiece trainer numbers characters in the order of a hash table,
which differs from run to run, and breaks ties between pairs by these numbers. So its
BPE trainer, which it also calls for WordPiece, is given words in which each character
at a word's start, and each one within a word, is a letter of its own, numbered by code
point: the same merges, and always the same.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.sentencepiece_model import make_small_text_error

UNKNOWN = "[UNK]"
"""The token of a word with a character that the vocabulary lacks, or that is too
long."""
PREFIX = "##"
"""What marks a piece that goes on within a word."""
# As in BERT: a longer word is unknown, and so is one with a rarer character.
_MAX_WORD_CHARS = 100
_MAX_CHARS = 1000
# First letters of two private alphabets, for characters by their place among those that
# are kept: at a word's start, and within a word.
_START_LETTERS = 0x100000
_WITHIN_LETTERS = 0xF0000
# Words that the trainer is given at once.
_REPEATED_WORDS = 4096


def train_wordpiece(
    config: TokenizerConfig, segments: Iterator[str]
) -> tuple[bytes, Sequence[str]]:
    """Trains a WordPiece tokenizer, whose special tokens have the first ids.

    Returns a tokenizer.json and the literals of its special tokens. Pairs merge by
    count, as the library does and BERT's authors did not publish. Memory grows with the
    number of distinct words. Raises MaxlmError: a text that yields fewer tokens, or has
    more characters, than `vocab_size`.
    """
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    normalizer = normalizers.BertNormalizer(lowercase=config.lowercase)
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for segment in segments:
        words = pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(segment))
        counts.update(word for word, _ in words if len(word) <= _MAX_WORD_CHARS)
    literals = list(dict.fromkeys((*config.special_literals, UNKNOWN)))
    pieces = _learn_pieces(counts, config.vocab_size - len(literals))
    vocab_size = len(literals) + len(pieces)
    if vocab_size > config.vocab_size:
        message = f"vocab_size={config.vocab_size} is too small for the characters of the text"
        raise MaxlmError(message, fix=f"set vocab_size to {vocab_size} or more")
    if vocab_size < config.vocab_size:
        raise make_small_text_error(config, vocab_size)
    vocab = {token: token_id for token_id, token in enumerate([*literals, *pieces])}
    model = models.WordPiece(
        vocab, unk_token=UNKNOWN, max_input_chars_per_word=_MAX_WORD_CHARS
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.WordPiece(prefix=PREFIX)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(literals)
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        # Not the literals themselves, in which the template would read ":" and "$" as
        # its signs.
        single="bos $A eos",
        special_tokens=[
            {"id": role, "ids": [vocab[literal]], "tokens": [literal]}
            for role, literal in (("bos", config.bos), ("eos", config.eos))
        ],
    )
    return tokenizer.to_str().encode(), literals


def _learn_pieces(counts: Counter[str], num_pieces: int) -> list[str]:
    """Learns up to so many pieces of words, given how often each word occurs, in order
    of their ids: characters first, then merges. All characters are pieces, also if they
    are more."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    char_counts: Counter[str] = Counter()
    for word, count in counts.items():
        for char in word:
            char_counts[char] += count
    by_count = sorted(char_counts, key=lambda char: (-char_counts[char], char))
    alphabet = sorted(by_count[:_MAX_CHARS])
    place_by_char = {char: place for place, char in enumerate(alphabet)}

    def spell_words() -> Iterator[str]:
        """Yields each word, in letters of both alphabets, as often as it occurs."""
        for word, count in counts.items():
            if not all(char in place_by_char for char in word):
                continue
            letters = [chr(_START_LETTERS + place_by_char[word[0]])]
            for char in word[1:]:
                letters.append(chr(_WITHIN_LETTERS + place_by_char[char]))
            spelled = "".join(letters)
            for num_spelled in range(0, count, _REPEATED_WORDS):
                yield f"{spelled} " * min(_REPEATED_WORDS, count - num_spelled)

    def read_piece(spelled: str) -> str:
        """Returns the piece that letters of both alphabets stand for."""
        is_within = ord(spelled[0]) < _START_LETTERS
        # Both alphabets begin at a multiple of 0x10000.
        chars = "".join(alphabet[ord(letter) & 0xFFFF] for letter in spelled)
        return f"{PREFIX}{chars}" if is_within else chars

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(vocab_size=max(num_pieces, 0), show_progress=False)
    tokenizer.train_from_iterator(spell_words(), trainer)
    id_by_spelled = tokenizer.get_vocab()
    return [
        read_piece(spelled)
        for spelled in sorted(id_by_spelled, key=id_by_spelled.__getitem__)
    ]
