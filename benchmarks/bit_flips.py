"""Check that a bit flipped on disk is never read as another value.

    python benchmarks/bit_flips.py [--flips 400] [--seed 0]

Makes a token store and its packing index. Then it flips one bit at a time, in a random
file of each kind, and reads that kind again. Kinds without checksums of their parts
(the packing index, the store's small files) are verified as whole files. Prints how
many flips caused an error that names the file, how many changed no value (an unused
bit), and how many were read as other values. Exits with 1 if a flip was read as another
value, or an error named no file.
"""

import argparse
import logging
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maxlm.config import MaxlmError

TEXTS = [
    f"{i} " + " ".join(f"word{i * j % 89}" for j in range(i % 41 + 3))
    for i in range(700)
]


@dataclass(frozen=True)
class Kind:
    """Files of one kind, and how to read all that they hold."""

    files: Sequence[Path]
    read: Callable[[], Any]
    names: Sequence[str] = ()
    """What an error may name instead of the file."""


def count_flips(
    kinds: Mapping[str, Kind], flips: int, seed: int
) -> dict[str, Counter[str]]:
    """Flip so many single bits of each kind's files, one at a time.

    Returns:
        For each kind, how many flips were "refused", read as "equal" values, read as
        "other" values, or ended in an error that is "unnamed".
    """
    chosen = random.Random(seed)
    return {
        name: Counter(_flip(kind, chosen, kind.read()) for _ in range(flips))
        for name, kind in kinds.items()
    }


def _flip(kind: Kind, chosen: random.Random, expected: Any) -> str:
    path = chosen.choice(kind.files)
    data = path.read_bytes()
    bit = chosen.randrange(len(data) * 8)
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    try:
        outcome = "equal" if kind.read() == expected else "other"
    except MaxlmError as error:
        named = any(str(name) in str(error) for name in (path, *kind.names))
        outcome = "refused" if named else "unnamed"
    # Of any other kind, it is what this program counts: an error that names no file.
    except Exception as error:
        outcome = f"unnamed ({error!r:.80})"
    finally:
        path.write_bytes(data)
    if outcome not in ("refused", "equal"):
        print(f"{path}: bit {bit}: {outcome}", file=sys.stderr)
    return outcome.split()[0]


def make_kinds(folder: Path) -> dict[str, Kind]:
    """A store and an index in `folder`."""
    from maxlm.data.documents.config import SourceConfig
    from maxlm.data.loader.batches import LoaderConfig, make_batches
    from maxlm.data.store.build import build_store
    from maxlm.data.store.store import TokenStore
    from maxlm.data.tokenizer.config import TokenizerConfig
    from maxlm.data.tokenizer.train import train_tokenizer

    (folder / "texts").mkdir()
    for i, text in enumerate(TEXTS):
        (folder / "texts" / f"{i:04d}.txt").write_text(text)
    documents = SourceConfig(documents=(str(folder / "texts"),))
    tokenizer = train_tokenizer(
        TokenizerConfig(vocab_size=300), (t.encode() for t in TEXTS)
    )
    tokenizer.save(folder / "tokenizer")
    build_store(documents, folder / "tokenizer", folder / "store", workers=1)

    def stored() -> tuple[Any, ...]:
        store = TokenStore.open(folder / "store")
        offsets = store.offsets[:]
        tokens = store.read(0, store.num_tokens)
        return store.manifest, offsets.tolist(), tokens.tolist()

    def verified() -> Any:
        return TokenStore.open(folder / "store", verify=True).manifest

    def packed() -> list[Any]:
        config = LoaderConfig(
            seq_len=64, packing="best_fit", shuffle=False, verify=True
        )
        store = TokenStore.open(folder / "store")
        batches = make_batches({"a": store}, {"a": 1}, config, seed=0)
        tokens = [
            batches.rows(step)["tokens"].tolist() for step in range(len(TEXTS) // 8)
        ]
        return [batches.sources[0].num_sequences, tokens]

    packed()
    store = folder / "store"
    others = [
        *_files(store / "tokenizer"),
        *store.glob("*/zarr.json"),
        store / "checksums.sha256",
    ]
    arrays = {name: folder / "store" / name for name in ("tokens", "offsets")}
    return {
        **{
            name: Kind(_files(path / "c"), stored, [str(path)])
            for name, path in arrays.items()
        },
        "manifest": Kind([folder / "store" / "manifest.json"], stored),
        "other files": Kind(others, verified),
        "packing index": Kind(_files(store / "packing"), packed),
    }


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Flip single bits on the disk and read."
    )
    parser.add_argument("--flips", type=int, default=400, help="Of each kind of file.")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        counts_by_kind = count_flips(
            make_kinds(Path(folder)), arguments.flips, arguments.seed
        )
    for name, counts in counts_by_kind.items():
        words = ", ".join(
            f"{counts[k]} {k}" for k in ("refused", "equal", "other", "unnamed")
        )
        print(f"{name}: {arguments.flips} flips, {words}")
    return int(
        any(counts["other"] or counts["unnamed"] for counts in counts_by_kind.values())
    )


if __name__ == "__main__":
    sys.exit(main())
