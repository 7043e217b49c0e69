"""A reader of document folders as an external package writes it, in place of the one that
reads what ``maxlm corpus run`` made: paragraphs of plain files, with a rule."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from maxlm.data.documents.config import FilesConfig, SourceConfig
from maxlm.data.documents.document import Document, FileSlice, SourceFile
from maxlm.data.documents.files import DOCUMENT_READERS, describe_filter_rules
from maxlm.data.documents.reader import read_documents


class ParagraphReader:
    """Reads FOLDER/documents/*.txt, a document a paragraph; FOLDER/corpus.json has the
    length of the shortest that is taken."""

    def list_corpus_files(
        self, folder: Path, config: FilesConfig
    ) -> Iterable[SourceFile]:
        del config
        shortest = json.loads((folder / "corpus.json").read_text())["shortest"]
        for path in sorted((folder / "documents").glob("*.txt")):
            state = path.stat()
            yield SourceFile(
                path=path,
                name=path.name,
                format="corpus",
                compression="none",
                size=state.st_size,
                mtime_ns=state.st_mtime_ns,
                extra_paths=(folder / "corpus.json",),
                details=shortest,
            )

    def read_corpus_slice(self, part: FileSlice) -> Iterator[Document | None]:
        paragraphs = part.file.path.read_text().split("\n\n")
        for number, text in enumerate(paragraphs):
            is_taken = len(text) >= part.file.details
            document = Document(f"{part.file.name}#{number}", text.encode())
            yield document if is_taken else None

    def describe_filter_rules(self, files: Iterable[SourceFile]) -> str:
        return json.dumps(sorted({file.details for file in files}))


def test_its_folders_are_a_source_of_documents(tmp_path, monkeypatch):
    # Restored, so that other tests read corpora.
    monkeypatch.setattr(DOCUMENT_READERS, "_loaded", {})
    DOCUMENT_READERS.register("corpus", ParagraphReader())
    (tmp_path / "documents").mkdir()
    (tmp_path / "corpus.json").write_text('{"shortest": 3}')
    (tmp_path / "documents" / "b.txt").write_text("no\n\nthird")
    (tmp_path / "documents" / "a.txt").write_text("first\n\nsecond\n\n\n\n")
    source = SourceConfig(documents=(str(tmp_path),))
    documents = [(document.id, document.text) for document in read_documents(source)]
    assert documents == [
        ("a.txt#0", b"first"),
        ("a.txt#1", b"second"),
        ("b.txt#1", b"third"),
    ]
    reader = DOCUMENT_READERS.get("corpus")
    files = list(reader.list_corpus_files(tmp_path, source))
    assert describe_filter_rules(files) == "[3]"
