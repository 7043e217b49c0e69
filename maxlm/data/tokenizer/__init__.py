"""Text <-> ids: one interface over byte-level BPE and SentencePiece, exact for any bytes, and over
the tokenizers of Hugging Face checkpoints."""

from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.files import holds_tokenizer, load_tokenizer
from maxlm.data.tokenizer.foreign import export_tokenizer, import_tokenizer
from maxlm.data.tokenizer.interface import Tokenizer
from maxlm.data.tokenizer.stats import TokenizerStats, tokenizer_stats
from maxlm.data.tokenizer.stream import StreamDecoder
from maxlm.data.tokenizer.threads import use_one_thread
from maxlm.data.tokenizer.train import train_tokenizer

__all__ = [
    "StreamDecoder",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerStats",
    "export_tokenizer",
    "holds_tokenizer",
    "import_tokenizer",
    "load_tokenizer",
    "tokenizer_stats",
    "train_tokenizer",
    "use_one_thread",
]
