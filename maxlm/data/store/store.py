"""Random access to a token store."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from maxlm.config import MaxlmError
from maxlm.data.store.arrays import array_error, open_for_reading
from maxlm.data.store.manifest import Manifest, read_manifest

if TYPE_CHECKING:
    from maxlm.data.tokenizer import Tokenizer

_VERIFY_TOKENS = 4 << 20
_REBUILD = "build the store again with maxlm corpus build"


class TokenStore:
    """A finished token store, open for reading.

    Documents lie end to end in one array of tokens, each as [bos] + tokens + [eos]; document i
    is `offsets[i]` to `offsets[i + 1]`. Pickling carries the path and the manifest; a worker
    process opens the arrays when it first reads.
    """

    def __init__(self, path: Path, manifest: Manifest, cache_bytes: int):
        self.path, self.manifest, self.cache_bytes = path, manifest, cache_bytes

    @classmethod
    def open(cls, path: Path | str, *, cache_bytes: int = 64 << 20) -> TokenStore:
        """Open the store in folder `path`.

        Args:
            cache_bytes: how much decompressed data to keep for later reads.

        Raises:
            MaxlmError: no store there, or its manifest and arrays do not fit together.
        """
        store = cls(Path(path), read_manifest(Path(path)), cache_bytes)
        store._check_shapes()
        return store

    @property
    def num_tokens(self) -> int:
        return self.manifest.num_tokens

    @property
    def num_documents(self) -> int:
        return self.manifest.num_documents

    @property
    def tokenizer_folder(self) -> Path:
        """The tokenizer that made the store."""
        return self.path / "tokenizer"

    @cached_property
    def offsets(self) -> np.ndarray:
        """Where documents begin: int64 [num_documents + 1]; the last is `num_tokens`."""
        return self._wait(self._offsets.read(), "offsets")

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop`: uint16 or uint32 [stop - start].

        Raises:
            IndexError: the range does not lie within the store.
            MaxlmError: the data are missing or damaged.
        """
        return self._wait(self._tokens[self._range(start, stop)].read(), "tokens")

    def read_many(self, starts: Sequence[int], stops: Sequence[int]) -> list[np.ndarray]:
        """Several ranges at once, read concurrently; see `read`."""
        ranges = [self._range(a, b) for a, b in zip(starts, stops, strict=True)]
        futures = [self._tokens[each].read() for each in ranges]
        return [self._wait(future, "tokens") for future in futures]

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, with its bos and eos."""
        if not 0 <= index < self.num_documents:
            what = f"there is no document {index}; the store has {self.num_documents}"
            fix = f"choose 0 to {self.num_documents - 1}"
            raise MaxlmError(what, where=str(self.path), fix=fix)
        start, stop = np.asarray(self._wait(self._offsets[index : index + 2].read(), "offsets"))
        return self.read(int(start), int(stop))

    def text_tokens(self, index: int) -> np.ndarray:
        """The tokens of one document's text, without its bos and eos."""
        return self.document(index)[self._opening : -1]

    def verify(self) -> None:
        """Check the offsets and read every token.

        Raises:
            MaxlmError: the first inconsistency found.
        """
        if self.offsets[0] != 0 or self.offsets[-1] != self.num_tokens:
            ends = f"{self.offsets[0]} to {self.offsets[-1]}"
            raise self._damaged(f"offsets run from {ends}, not from 0 to {self.num_tokens}")
        if np.any(np.diff(self.offsets) < 1 + self._opening):
            least = "two (bos and eos)" if self._opening else "one (eos)"
            raise self._damaged(f"offsets do not rise by at least {least}")
        bos, eos = self.manifest.bos_id, self.manifest.eos_id
        for start in range(0, self.num_tokens, _VERIFY_TOKENS):
            tokens = self.read(start, min(start + _VERIFY_TOKENS, self.num_tokens))
            if tokens.max() >= self.manifest.vocab_size:
                raise self._damaged(f"token {tokens.max()} lies outside the vocabulary")
            low, high = np.searchsorted(self.offsets, [start, start + len(tokens)])
            if bos is not None and np.any(tokens[self.offsets[low:high] - start] != bos):
                raise self._damaged("a document does not begin with bos")
            ends = self.offsets[max(low, 1) : high + 1] - 1 - start
            if np.any(tokens[ends[(ends >= 0) & (ends < len(tokens))]] != eos):
                raise self._damaged("a document does not end with eos")

    @property
    def _opening(self) -> int:
        """How many tokens each document opens with."""
        return 0 if self.manifest.bos_id is None else 1

    @cached_property
    def _tokens(self):
        return open_for_reading(self.path, "tokens", self.cache_bytes)

    @cached_property
    def _offsets(self):
        return open_for_reading(self.path, "offsets", 0)

    def _check_shapes(self) -> None:
        expected = {
            "tokens": (self._tokens, self.num_tokens, self.manifest.dtype),
            "offsets": (self._offsets, self.num_documents + 1, "int64"),
        }
        for name, (array, size, dtype) in expected.items():
            found = (array.shape, array.dtype.name)
            if found != ((size,), dtype):
                what = f"{name} are {found[1]} {list(found[0])}, the manifest says {dtype} [{size}]"
                raise self._damaged(what)

    def _range(self, start: int, stop: int) -> slice:
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"[{start}, {stop}) does not lie within {self.num_tokens} tokens")
        return slice(int(start), int(stop))

    def _wait(self, future, name: str) -> np.ndarray:
        try:
            return future.result()
        except (ValueError, OSError) as error:
            raise array_error(self.path / name, error, _REBUILD) from error

    def _damaged(self, what: str) -> MaxlmError:
        return MaxlmError(f"damaged store: {what}", where=str(self.path), fix=_REBUILD)

    def __getstate__(self):
        return {key: self.__dict__[key] for key in ("path", "manifest", "cache_bytes")}


def check_tokenizer(store: TokenStore, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer other than the one that made the store.

    Raises:
        MaxlmError: the fingerprints differ.
    """
    made_with = store.manifest.tokenizer_fingerprint
    if made_with != tokenizer.fingerprint:
        what = (
            f"the store was made with another tokenizer ({made_with[:12]}, "
            f"not {tokenizer.fingerprint[:12]})"
        )
        fix = f"use the tokenizer in {store.tokenizer_folder}, or build the store again with yours"
        raise MaxlmError(what, where=str(store.path), fix=fix)
