"""Text <-> ids: byte-level BPE and SentencePiece, exact for any bytes, WordPiece, and
imported tokenizers."""

from maxlm.data.tokenizer.bounds import make_token_count_bound
from maxlm.data.tokenizer.chat import (
    add_chat_template,
    check_tools_are_written,
    encode_chat,
    encode_chat_turns,
    render_chat,
    render_escaped_chat,
)
from maxlm.data.tokenizer.codec import StreamDecoder, Tokenizer
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.extend import extend_tokenizer
from maxlm.data.tokenizer.files import has_tokenizer_files
from maxlm.data.tokenizer.load import export_tokenizer, import_tokenizer, load_tokenizer
from maxlm.data.tokenizer.stats import compare_tokenizers, measure_tokenizer
from maxlm.data.tokenizer.train import train_tokenizer

__all__ = [
    "StreamDecoder",
    "Tokenizer",
    "TokenizerConfig",
    "add_chat_template",
    "check_tools_are_written",
    "compare_tokenizers",
    "encode_chat",
    "encode_chat_turns",
    "export_tokenizer",
    "extend_tokenizer",
    "has_tokenizer_files",
    "import_tokenizer",
    "load_tokenizer",
    "make_token_count_bound",
    "measure_tokenizer",
    "render_chat",
    "render_escaped_chat",
    "train_tokenizer",
]
