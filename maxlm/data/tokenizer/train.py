"""Training a tokenizer from a stream of texts."""

import re
from collections.abc import Iterable, Iterator

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.bpe import ByteLevelBPE, train_bpe
from maxlm.data.tokenizer.chat import chat_files
from maxlm.data.tokenizer.codec import CodecTokenizer, SpecialTokens
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.huggingface import HuggingFaceModel
from maxlm.data.tokenizer.interface import Tokenizer
from maxlm.data.tokenizer.segments import split_segments
from maxlm.data.tokenizer.sentencepiece_model import SentencePieceModel, train_sentencepiece
from maxlm.data.tokenizer.wordpiece import train_wordpiece


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str | bytes]) -> Tokenizer:
    """A tokenizer learned from the first ``config.sample_bytes`` bytes of ``texts``.

    The same texts in the same order give the same tokenizer. Texts are read once, as they are
    needed. Stray bytes and the literals of special tokens are left out of what is learned from.

    Raises:
        MaxlmError: no text, or a vocab_size too small for bytes and special tokens, for the
            characters of the text (SentencePiece), or too large for the text.
    """
    carried = chat_files(config)
    if config.kind == "wordpiece":
        segments = _require_text(_training_segments(config, texts))
        data, literals = train_wordpiece(config, segments)
        codec = HuggingFaceModel(data, literals)
        special = SpecialTokens(codec.special_tokens, config.bos, config.eos, config.pad)
        return CodecTokenizer(config.kind, codec, special, carried=carried)
    literals = config.special_literals
    unknown = 0 if config.kind == "bpe" else 1
    least = 256 + len(literals) + unknown
    if config.vocab_size < least:
        parts = f"256 bytes, {len(literals)} special" + (", 1 unknown" if unknown else "")
        raise MaxlmError(
            f"vocab_size={config.vocab_size} has no room for every byte and special token",
            fix=f"set it to {least} ({parts}) or more",
        )
    segments = _require_text(_training_segments(config, texts))
    if config.kind == "bpe":
        data, ids = train_bpe(config, segments)
        codec = ByteLevelBPE(data)
    else:
        data, ids = train_sentencepiece(config, segments)
        codec = SentencePieceModel(data)
    special = SpecialTokens(ids, bos=config.bos, eos=config.eos, pad=config.pad)
    return CodecTokenizer(config.kind, codec, special, carried=carried)


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
            for segment in split_segments(part, reserved="", cut=ByteLevelBPE.cut):
                if isinstance(segment, str):
                    yield segment
        remaining -= len(raw)
        if remaining <= 0:
            return


def _require_text(segments: Iterator[str]) -> Iterator[str]:
    first = next(segments, None)
    if first is None:
        raise MaxlmError("no text to train a tokenizer on", fix="give text that is not empty")

    def again() -> Iterator[str]:
        yield first
        yield from segments

    return again()
