"""Token stores: a tokenized corpus on disk, for random access.

A store is a folder with `tokens/` (zarr3, uint16 or uint32), `offsets/` (zarr3, int64),
the `tokenizer/` that made it, and `manifest.json`. `build_store` writes one;
`TokenStore` reads it.
"""
