"""Training a tokenizer from a stream of texts.

WordPiece (Schuster & Nakajima, 2012) is as BERT has it. The library's own WordPiece trainer numbers
characters in the order of a hash table, which differs from run to run, and breaks ties between
pairs by these numbers. So its BPE trainer, which it also calls for WordPiece, is given words in
which each character at a word's start and each one within a word is a letter of its own, numbered
by code point: the same merges, and always the same.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.chat import make_chat_files
from maxlm.data.tokenizer.codec import SpecialTokens, Tokenizer, split_segments
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.huggingface import (
    PATTERN,
    PATTERN_CUT,
    HuggingFaceCodec,
    build_byte_alphabet,
)
from maxlm.data.tokenizer.sentencepiece_model import (
    SentencePieceCodec,
    make_small_text_error,
    make_small_vocabulary_error,
    train_sentencepiece,
)

UNKNOWN = "[UNK]"
PREFIX = "##"
# As in BERT: a longer word is unknown, and so is one with a rarer character.
_WORD_CHARS = 100
_ALPHABET = 1000
# Private code points, by place in the alphabet: at a word's start, and within one.
_START, _WITHIN = 0x100000, 0xF0000
_REPEATED = 4096


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str | bytes]) -> Tokenizer:
    """Learn a tokenizer from the first ``config.sample_bytes`` bytes of ``texts``.

    The same texts in the same order give the same tokenizer. Texts are read once, as they are
    needed. Stray bytes and the literals of special tokens are left out of what is learned from.
    """
    literals = config.special_literals
    num_unknown = 0 if config.kind == "bpe" else 1
    smallest = 256 + len(literals) + num_unknown
    if config.kind != "wordpiece" and config.vocab_size < smallest:
        parts = f"256 bytes, {len(literals)} special" + (", 1 unknown" if num_unknown else "")
        what = f"vocab_size={config.vocab_size} has no room for every byte and special token"
        raise MaxlmError(what, fix=f"set it to {smallest} ({parts}) or more")
    segments = _training_segments(config, texts)
    first = next(segments, None)
    if first is None:
        raise MaxlmError("no text to train a tokenizer on", fix="give text that is not empty")
    segments = itertools.chain([first], segments)
    if config.kind.startswith("sentencepiece"):
        data, ids = train_sentencepiece(config, segments)
        codec = SentencePieceCodec(data)
    else:
        learn = train_bpe if config.kind == "bpe" else train_wordpiece
        codec = HuggingFaceCodec(*learn(config, segments))
        ids = codec.special_tokens
    special = SpecialTokens(ids, bos=config.bos, eos=config.eos, pad=config.pad)
    return Tokenizer(config.kind, codec, special, extra_files=make_chat_files(config))


def train_bpe(config: TokenizerConfig, segments: Iterator[str]) -> tuple[bytes, Sequence[str]]:
    """Trains a byte-level BPE (Sennrich et al., 2016, over bytes as in GPT-2), whose special tokens
    have the last ids. Returns a tokenizer.json and the literals of its special tokens.

    The commonest pair merges first; of equally common ones that of the lower ids. Memory grows with
    the number of distinct words, not with the text.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    literals = config.special_literals
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size - len(literals),
        initial_alphabet=build_byte_alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(segments, trainer)
    _require_size(config, tokenizer.get_vocab_size() + len(literals))
    tokenizer.add_special_tokens(list(literals))
    return tokenizer.to_str().encode(), literals


def _training_segments(config: TokenizerConfig, texts: Iterable[str | bytes]) -> Iterator[str]:
    """The valid text of the sample, without the special tokens' literals.

    A token spelled like a special one would share its id, so none may be learned.
    """
    pattern = "|".join(re.escape(literal) for literal in config.special_literals)
    literals = re.compile(pattern.encode())
    remaining = config.sample_bytes
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        for part in literals.split(raw[:remaining]):
            for segment in split_segments(part, reserved_chars="", cut_pattern=PATTERN_CUT):
                if isinstance(segment, str):
                    yield segment
        remaining -= len(raw)
        if remaining <= 0:
            return


def train_wordpiece(
    config: TokenizerConfig, segments: Iterator[str]
) -> tuple[bytes, Sequence[str]]:
    """Trains a WordPiece tokenizer on ``segments``, and returns as `train_bpe` does.

    Pairs are merged by count, as the library does and BERT's authors did not publish. Memory
    grows with the number of distinct words.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    normalizer = normalizers.BertNormalizer(lowercase=config.lowercase)
    split = pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for segment in segments:
        found = split.pre_tokenize_str(normalizer.normalize_str(segment))
        words.update(word for word, _ in found if len(word) <= _WORD_CHARS)
    literals = list(dict.fromkeys((*config.special_literals, UNKNOWN)))
    pieces = _learn(words, config.vocab_size - len(literals))
    reached = len(pieces) + len(literals)
    if reached > config.vocab_size:
        raise make_small_vocabulary_error(config, reached)
    _require_size(config, reached)
    vocab = {piece: i for i, piece in enumerate([*literals, *pieces])}
    model = models.WordPiece(vocab, unk_token=UNKNOWN, max_input_chars_per_word=_WORD_CHARS)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = split  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.WordPiece(prefix=PREFIX)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(literals)
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="bos $A eos",  # Not their literals, in which it would read ":" and "$" as its signs.
        special_tokens=[
            {"id": role, "ids": [vocab[literal]], "tokens": [literal]}
            for role, literal in (("bos", config.bos), ("eos", config.eos))
        ],
    )
    return tokenizer.to_str().encode(), literals


def _require_size(config: TokenizerConfig, reached: int) -> None:
    if reached < config.vocab_size:
        raise make_small_text_error(config, reached)


def _learn(words: Counter[str], size: int) -> list[str]:
    """Learns up to ``size`` pieces, or all characters if more, those within words marked."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    chars: Counter[str] = Counter()
    for word, count in words.items():
        for char in word:
            chars[char] += count
    kept = sorted(chars, key=lambda char: (-chars[char], char))[:_ALPHABET]
    places = {char: place for place, char in enumerate(sorted(kept))}

    def texts() -> Iterator[str]:
        for word, count in words.items():
            if all(char in places for char in word):
                rest = "".join(chr(_WITHIN + places[char]) for char in word[1:])
                text = f"{chr(_START + places[word[0]])}{rest} "
                for done in range(0, count, _REPEATED):
                    yield text * min(_REPEATED, count - done)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(vocab_size=max(size, 0), show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    vocab = tokenizer.get_vocab()
    letters = sorted(places)

    def spelled(piece: str) -> str:
        within = ord(piece[0]) < _START
        mark = PREFIX if within else ""
        return mark + "".join(letters[ord(char) & 0xFFFF] for char in piece)

    return [spelled(piece) for piece in sorted(vocab, key=vocab.__getitem__)]
