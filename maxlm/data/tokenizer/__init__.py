"""Text <-> ids: one interface over byte-level BPE and SentencePiece, exact for any bytes, over
WordPiece, and over other people's tokenizers."""

from maxlm.data.tokenizer.chat import encode_chat, render_chat
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.files import holds_tokenizer, load_tokenizer
from maxlm.data.tokenizer.foreign import export_tokenizer, import_tokenizer
from maxlm.data.tokenizer.interface import Tokenizer
from maxlm.data.tokenizer.stats import TokenizerStats, compare_tokenizers, tokenizer_stats
from maxlm.data.tokenizer.stream import StreamDecoder
from maxlm.data.tokenizer.train import train_tokenizer

__all__ = [
    "StreamDecoder",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerStats",
    "compare_tokenizers",
    "encode_chat",
    "export_tokenizer",
    "holds_tokenizer",
    "import_tokenizer",
    "load_tokenizer",
    "render_chat",
    "tokenizer_stats",
    "train_tokenizer",
]
