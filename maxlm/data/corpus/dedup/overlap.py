"""The n-grams of evaluation sets, to be found in documents."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from maxlm.config import MaxlmError
from maxlm.data.corpus.compiled import compiled
from maxlm.data.corpus.config import SourceConfig
from maxlm.data.corpus.dedup.columns import concatenate, first_of_runs
from maxlm.data.corpus.dedup.words import letter_table
from maxlm.data.corpus.documents import read_documents
from maxlm.data.corpus.files import list_files
from maxlm.data.corpus.textbuffers import Texts, pack_texts


@dataclass(frozen=True)
class GramIndex:
    """Which n-gram belongs to which items of evaluation sets."""

    grams: np.ndarray
    """Hashes of n-grams, sorted: uint64 [grams]."""
    starts: np.ndarray
    """Gram g belongs to the items owners[starts[g]:starts[g + 1]]."""
    owners: np.ndarray
    sizes: np.ndarray
    """Different n-grams of each item: int64 [items]. 0: it is too short, or all of it common."""
    ids: tuple[str, ...]
    sets: tuple[str, ...]
    """The set of each item."""
    is_size: np.ndarray
    """bool [n + 1]: which n there are."""
    filter_bits: np.ndarray
    """See `kernels.shingles.find_grams`."""


def content_hash(sets: Mapping[str, SourceConfig]) -> str:
    """A hash of the files of evaluation sets."""
    digest = hashlib.sha256()
    for name, source in sets.items():
        for file in list_files(source):
            digest.update(f"{name}\n{file.name}\n{file.size}\n".encode())
            with file.path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def index_sets(
    sets: Mapping[str, SourceConfig], n: int, shortest: int, max_items: int
) -> GramIndex:
    """The n-grams of evaluation sets; made once in a process for the same files and settings.

    Args:
        n: words in an n-gram. An item of fewer words is looked for as a whole,
        shortest: if it has this many; else it is left out.
        max_items: n-grams of more items of a set are left out, as text of a template.

    Raises:
        MaxlmError: a file is missing or can't be read; a set has nothing to look for.
    """
    plain = json.dumps({name: source.model_dump(mode="json") for name, source in sets.items()})
    return _index(plain, content_hash(sets), n, shortest, max_items)


@lru_cache(maxsize=2)
def _index(plain: str, content: str, n: int, shortest: int, max_items: int) -> GramIndex:
    loops = compiled("shingles")
    sets = {name: SourceConfig(**source) for name, source in json.loads(plain).items()}
    is_size = np.zeros(n + 1, np.bool_)
    grams, owners, ids, names = [], [], [], []
    for name, source in sets.items():
        first = len(ids)
        mine, whose = [], []
        for document in read_documents(source):
            data = pack_texts([document.text]).data
            found, words = loops.shingles(data, 0, len(data), letter_table(), n)
            if words >= shortest:
                is_size[min(words, n)] = True
                mine.append(np.unique(found))
                whose.append(np.full(len(mine[-1]), len(ids)))
            ids.append(document.id)
            names.append(name)
        gram, owner = concatenate(mine, np.uint64), concatenate(whose, np.int64)
        _, place, count = np.unique(gram, return_inverse=True, return_counts=True)
        rare = count[place] <= max_items
        if not rare.any():
            what = f'evaluation set "{name}" has no text of {shortest} words or more to look for'
            fix = "check its files and text_field, or lower shortest"
            raise MaxlmError(what if len(ids) > first else f'no items in "{name}"', fix=fix)
        grams.append(gram[rare])
        owners.append(owner[rare])
    gram, owner = concatenate(grams, np.uint64), concatenate(owners, np.int64)
    order = np.lexsort((owner, gram))
    starts = np.flatnonzero(first_of_runs(gram[order]))
    distinct = gram[order][starts]
    bits = np.zeros(1 << max(0, (16 * len(distinct)).bit_length() - 6), np.uint64)
    place = distinct & np.uint64(len(bits) * 64 - 1)
    np.bitwise_or.at(bits, place >> np.uint64(6), np.uint64(1) << (place & np.uint64(63)))
    return GramIndex(
        grams=distinct,
        starts=np.append(starts, len(gram)),
        owners=owner[order],
        sizes=np.bincount(owner, minlength=len(ids)),
        ids=tuple(ids),
        sets=tuple(names),
        is_size=is_size,
        filter_bits=bits,
    )


def find_grams(index: GramIndex, texts: Texts) -> np.ndarray:
    """Every n-gram of the index in texts: int64 [found, 4], see `kernels.shingles.find_grams`."""
    found = np.empty((1 << 10, 4), np.int64)
    while True:
        number = compiled("shingles").find_grams(
            texts.data, texts.offsets, letter_table(), index.is_size, index.grams,
            index.filter_bits, found,
        )  # fmt: skip
        if number <= len(found):
            return found[:number]
        found = np.empty((number, 4), np.int64)
