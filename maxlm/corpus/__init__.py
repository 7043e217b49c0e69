"""Documents: which files a corpus is made of, and the texts inside them.

A `SourceConfig` names files; `list_files` resolves them in a fixed order; `read_documents`
streams their documents; `is_heldout` splits documents by a hash of their text.
"""

from maxlm.corpus.config import PYTHON_STDLIB, SourceConfig
from maxlm.corpus.documents import Document, read_documents
from maxlm.corpus.files import SourceFile, find_files, list_files
from maxlm.corpus.split import is_heldout

__all__ = [
    "PYTHON_STDLIB",
    "Document",
    "SourceConfig",
    "SourceFile",
    "find_files",
    "is_heldout",
    "list_files",
    "read_documents",
]
