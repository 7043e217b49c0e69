"""Documents: which files a source is made of, and the texts inside them.

A `SourceConfig` names files; `find_files` resolves them in a fixed order;
`read_documents` streams their documents; `is_heldout` splits documents by a hash of
their text. A file is cut into slices that are read apart (`streams`).
"""
