"""Text <-> ids: byte-level BPE and SentencePiece, exact for any bytes, WordPiece, and
imported tokenizers."""
