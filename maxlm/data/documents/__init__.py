"""Documents: which files a source is made of, and the texts inside them.

A `SourceConfig` names files; `find_files` resolves them in a fixed order;
`read_documents` streams their documents; `is_heldout` splits documents by a hash of
their text. A file is cut into slices that are read apart (`streams`).
"""

from maxlm.data.documents.config import PYTHON_STDLIB, SourceConfig, is_installed_text
from maxlm.data.documents.document import Document, SourceFile, is_heldout
from maxlm.data.documents.files import find_files
from maxlm.data.documents.reader import read_documents

__all__ = [
    "PYTHON_STDLIB",
    "Document",
    "SourceConfig",
    "SourceFile",
    "find_files",
    "is_heldout",
    "is_installed_text",
    "read_documents",
]
