"""Training a tokenizer from a stream of texts."""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.chat import add_chat_template
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
    train_sentencepiece,
)
from maxlm.data.tokenizer.wordpiece import train_wordpiece


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str | bytes]) -> Tokenizer:
    """Learn a tokenizer from the first ``config.sample_bytes`` bytes of ``texts``.

    The same texts in the same order give the same tokenizer. Texts are read once, as
    they are needed. Stray bytes and the literals of special tokens are left out of what
    is learned from.
    """
    literals = config.special_literals
    num_unknown = 0 if config.kind == "bpe" else 1
    smallest = 256 + len(literals) + num_unknown
    if config.kind != "wordpiece" and config.vocab_size < smallest:
        parts = f"256 bytes, {len(literals)} special" + (
            ", 1 unknown" if num_unknown else ""
        )
        what = f"vocab_size={config.vocab_size} has no room for every byte and special token"
        raise MaxlmError(what, fix=f"set it to {smallest} ({parts}) or more")
    segments = _training_segments(config, texts)
    first = next(segments, None)
    if first is None:
        raise MaxlmError(
            "no text to train a tokenizer on", fix="give text that is not empty"
        )
    segments = itertools.chain([first], segments)
    if config.kind.startswith("sentencepiece"):
        data, ids = train_sentencepiece(config, segments)
        codec = SentencePieceCodec(data)
    elif config.kind == "wordpiece":
        codec = HuggingFaceCodec(*train_wordpiece(config, segments))
        ids = codec.special_tokens
    else:
        codec = HuggingFaceCodec(*train_bpe(config, segments), splits_by_pattern=True)
        ids = codec.special_tokens
    special = SpecialTokens(ids, bos=config.bos, eos=config.eos, pad=config.pad)
    tokenizer = Tokenizer(config.kind, codec, special)
    add_chat_template(tokenizer, config)
    return tokenizer


def train_bpe(
    config: TokenizerConfig, segments: Iterator[str]
) -> tuple[bytes, Sequence[str]]:
    """Trains a byte-level BPE (Sennrich et al., 2016, over bytes as in GPT-2), whose
    special tokens have the last ids. Returns a tokenizer.json and the literals of its
    special tokens.

    The commonest pair merges first; of equally common ones that of the lower ids.
    Memory grows with the number of distinct words, not with the text.
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
    reached = tokenizer.get_vocab_size() + len(literals)
    if reached < config.vocab_size:
        raise make_small_text_error(config, reached)
    tokenizer.add_special_tokens(list(literals))
    return tokenizer.to_str().encode(), literals


def _training_segments(
    config: TokenizerConfig, texts: Iterable[str | bytes]
) -> Iterator[str]:
    """The valid text of the sample, without the special tokens' literals.

    A token spelled like a special one would share its id, so none may be learned.
    """
    pattern = "|".join(re.escape(literal) for literal in config.special_literals)
    literals = re.compile(pattern.encode())
    remaining = config.sample_bytes
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        for part in literals.split(raw[:remaining]):
            for segment in split_segments(
                part, reserved_chars="", cut_pattern=PATTERN_CUT
            ):
                if isinstance(segment, str):
                    yield segment
        remaining -= len(raw)
        if remaining <= 0:
            return
