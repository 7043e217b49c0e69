"""Token stores: a tokenized corpus on disk, for random access.

A store is a folder with `tokens/` (zarr3, uint16 or uint32), `offsets/` (zarr3, int64),
the `tokenizer/` that made it, and `manifest.json`. `build_store` writes one;
`TokenStore` reads it.
"""

from maxlm.data.store.build import append_store, build_store
from maxlm.data.store.manifest import Manifest
from maxlm.data.store.store import TokenStore, check_tokenizer

__all__ = ["Manifest", "TokenStore", "append_store", "build_store", "check_tokenizer"]
