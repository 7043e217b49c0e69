"""Near-duplicates against brute force: sets of n-grams by other means than the
package's."""

import random
import re
import unicodedata
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxlm.corpus.dedup.columns import get_shard_path, write_columns
from maxlm.corpus.dedup.members import SelectedDocuments
from maxlm.corpus.dedup.minhash import (
    choose_banding,
    make_shingle_set,
)
from maxlm.corpus.dedup.pairs import (
    find_candidate_pairs,
    find_pair_range_starts,
    unpack_pairs,
    write_band_keys,
)
from maxlm.corpus.stage import JobRunner
from maxlm.corpus.stages.near import NearStage
from maxlm.runtime.pool import WorkerPool
from tests.corpus.corpora import add_labels, labels, make_corpus, run_stage

WORDS = [
    f"{a}{b}"
    for a in "bcdfgklmnprstvz"
    for b in ("a", "e", "io", "ou", "an", "er", "ish")
]
# Scripts with no spaces between words, which the package goes through letter by letter.
ALONE = r"[\u3040-\u309f\u3400-\u4dbf\u4e00-\u9fff]"


def words(text: str) -> list[str]:
    """The words of a text in Latin, Greek, Cyrillic, Han, ...; not in scripts with
    vowel marks."""
    plain = re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFD", text)).casefold()
    return re.findall(rf"{ALONE}|(?:(?!{ALONE})[^\W_])+", plain)


@cache
def grams(text: str, n: int = 5) -> set[tuple[str, ...]]:
    text_words = words(text)
    if not text_words:
        return set()
    # A text of fewer words is one gram.
    num_grams = max(1, len(text_words) - n + 1)
    return {tuple(text_words[i : i + n]) for i in range(num_grams)}


def jaccard(a: str, b: str) -> float:
    shared = grams(a) & grams(b)
    either = grams(a) | grams(b)
    return len(shared) / len(either) if either else 0.0


def texts_with_copies(seed: int, number: int = 120) -> list[str]:
    """Random texts and copies with some words replaced, so that many similarities
    occur."""
    random_ = random.Random(seed)
    texts = [
        " ".join(random_.choices(WORDS, k=random_.randint(1, 150)))
        for _ in range(number)
    ]
    for text in random_.choices(texts, k=number):
        edited = text.split(" ")
        num_edits = random_.choice((0, 0, 1, 1, 2, 3, 8))
        for _ in range(num_edits):
            word = random_.choice(WORDS).upper() + "!"
            edited[random_.randrange(len(edited))] = word
        texts.insert(random_.randrange(len(texts)), ", ".join(edited))
    return texts


@pytest.mark.parametrize(
    ("shards", "memory", "workers"), [(1, 1 << 29, 1), (5, 1 << 13, 2)]
)
def test_every_alike_pair_is_found_and_every_mark_is_right(
    tmp_path: Path, shards: int, memory: int, workers: int
) -> None:
    documents = [*texts_with_copies(0), "", "?!", None]
    scores = np.random.default_rng(0).integers(0, 3, len(documents)).astype(float)
    shard_views = make_corpus(tmp_path / "corpus", documents, shards, rows_per_group=50)
    add_labels(shard_views, "quality", score=pa.array(scores))
    stage = NearStage(keep_by="quality.score", memory=memory, recall=0.9999, hashes=80)
    run_stage(stage, shard_views, tmp_path / "scratch", workers)
    rows = labels(shard_views, stage).to_pylist()

    alike = {
        (i, j)
        for i, a in enumerate(documents)
        for j, b in enumerate(documents[:i])
        if a and b and jaccard(a, b) >= 0.8
    }
    assert len(alike) > 60
    for i, j in alike:
        assert rows[i]["duplicate"] or rows[j]["duplicate"]
        assert rows[i]["cluster"] == rows[j]["cluster"] is not None
    for i, row in enumerate(rows):
        if row["duplicate"]:
            original = int(row["of"][1:])
            assert not rows[original]["duplicate"]
            assert (scores[original], -original) > (scores[i], -i)
            similarity = jaccard(documents[i], documents[original])
            assert row["jaccard"] == pytest.approx(similarity)
            assert row["jaccard"] >= np.float32(0.8)
        else:
            assert row["of"] is row["jaccard"] is None
    clusters = [row["cluster"] for row in rows if row["cluster"] is not None]
    for row in rows[:-1]:
        is_alone = row["cluster"] is None
        assert row["cluster_size"] == (
            1 if is_alone else clusters.count(row["cluster"])
        )
    # They are numbered as they first appear.
    assert list(dict.fromkeys(clusters)) == list(range(len(set(clusters))))
    # The last document has no text.
    no_labels = dict.fromkeys(stage.schema().names)
    assert rows[-1] == {"id": f"d{len(rows) - 1}"} | no_labels


@pytest.mark.parametrize("memory", [1 << 29, 1 << 11])
def test_a_run_that_stops_at_any_step_goes_on(tmp_path: Path, memory: int) -> None:
    documents = texts_with_copies(6, 20)
    stage = NearStage(hashes=12, recall=0.9, memory=memory)
    whole = make_corpus(tmp_path / "whole", documents)
    run_stage(stage, whole, tmp_path / "other")
    shard_views = make_corpus(tmp_path / "corpus", documents)
    views = [replace(shard, output_stage="near") for shard in shard_views]
    (tmp_path / "scratch").mkdir()
    seen = []

    def stop(title: str, done: int, total: int) -> None:
        if title not in seen and 2 * done >= total:
            seen.append(title)
            raise KeyboardInterrupt

    with WorkerPool(1) as pool:
        run = JobRunner(stage.unique_name, pool, stop)
        for _ in range(5):
            with pytest.raises(KeyboardInterrupt):
                stage.label(views, tmp_path / "scratch", run)
        stage.label(views, tmp_path / "scratch", run)
    assert len(set(seen)) == 5
    assert labels(shard_views, stage).equals(labels(whole, stage))


def test_chains_of_likeness_delete_nothing_that_is_like_no_kept_document(
    tmp_path: Path,
) -> None:
    line = [f"word{i}" for i in range(200)]
    chain = [" ".join(line[start : start + 100]) for start in range(0, 100, 4)]
    assert jaccard(chain[0], chain[1]) >= 0.8
    assert jaccard(chain[0], chain[-1]) < 0.1
    shard_views = make_corpus(tmp_path / "corpus", chain)
    stage = NearStage(recall=0.9999)
    run_stage(stage, shard_views, tmp_path / "scratch")
    table = labels(shard_views, stage)
    assert set(table["cluster_size"].to_pylist()) == {len(chain)}
    assert table["duplicate"].to_pylist() == [i % 3 > 0 for i in range(25)]


def test_a_template_costs_no_quadratic_number_of_pairs_and_hides_no_copies(
    tmp_path: Path,
) -> None:
    random_ = random.Random(3)
    template = [f"t{i}" for i in range(200)]
    pages = [
        template + [f"u{random_.random()}"[:9] for _ in range(35)] for _ in range(600)
    ]
    copies = random_.sample(range(600), 60)
    pages += [[*pages[i][:50], "edited", *pages[i][50:]] for i in copies]
    texts = [" ".join(page) for page in pages]
    shard_views = make_corpus(tmp_path / "corpus", texts, rows_per_group=200)
    stage = NearStage(max_group=20)
    run_stage(stage, shard_views, tmp_path / "scratch")
    originals = labels(shard_views, stage)["of"].to_pylist()[600:]
    expected = [f"d{i}" for i in copies]
    pairs = zip(originals, expected, strict=True)
    assert sum(original == name for original, name in pairs) >= 59


@given(
    st.text(
        st.sampled_from(
            "aB\u00e9\u0301\u00df "
            "\n.,_-'1\u0416\u0439\u03c2\u03a3日本ア한\x00\U0001f600\u00ad"
        ),
        max_size=40,
    ),
    st.integers(1, 4),
)
def test_words_and_sets_are_those_of_regular_expressions(text: str, n: int) -> None:
    text = unicodedata.normalize("NFC", text)
    shingles = make_shingle_set(text, n).tolist()
    assert shingles == sorted(set(shingles))
    assert len(shingles) == len(grams(text.replace("\u00ad", ""), n))
    # Accents apart or joined, and format characters that are not seen, make no
    # difference.
    apart = ""
    for character in text:
        # A syllable of Hangul would come apart into letters.
        is_hangul = character == "한"
        apart += character if is_hangul else unicodedata.normalize("NFD", character)
    variants = [apart, "\u00ad".join(text)]
    if "ß" not in text:  # In capitals it is two letters.
        variants.append(text.upper())
    for variant in variants:
        assert make_shingle_set(variant, n).tolist() == shingles


@given(st.floats(0.1, 1), st.floats(0.5, 0.9999), st.integers(1, 512))
def test_bandings_keep_their_promise(
    similarity: float, recall: float, most: int
) -> None:
    bands, rows = choose_banding(similarity, recall, most)
    chance_of_a_band = similarity**rows
    assert 1 - (1 - chance_of_a_band) ** bands >= recall - 1e-9
    assert rows == 1 or bands * rows <= most
    if similarity < 1:
        # Bands of one more row would need more hashes than there are.
        more = rows + 1
        needed = np.log(1 - recall) / np.log(1 - similarity**more)
        assert np.ceil(needed - 1e-6) * more > most or needed * more > most


@pytest.mark.parametrize(
    ("size", "limit"), [(2, 8), (8, 8), (9, 8), (500, 8), (500, 1000)]
)
def test_pairs_of_a_group(tmp_path: Path, size: int, limit: int) -> None:
    rank = np.random.default_rng(size).permutation(size).astype(float)
    write_columns(get_shard_path(tmp_path, "members", "s"), {"rank": rank})
    # One band, in which all documents have the same key.
    same_keys = np.full((1, size), 7, np.uint64)
    write_band_keys(tmp_path, "s", same_keys, np.ones(size, np.bool_))
    members = SelectedDocuments(tmp_path, ("s",), (0, size))
    parts = list(find_candidate_pairs(members, 1, 1, 0, limit))
    packed_pairs = np.unique(np.concatenate(parts))
    low, high = unpack_pairs(packed_pairs)
    assert (low < high).all()
    if size <= limit:
        assert len(packed_pairs) == size * (size - 1) // 2
    else:
        assert len(packed_pairs) <= size * limit // 2
        pairs = set(zip(low.tolist(), high.tolist(), strict=True))
        best = int(np.argmax(rank))
        pairs_with_best = {(i, best) for i in range(best)}
        pairs_with_best |= {(best, i) for i in range(best + 1, size)}
        assert pairs_with_best <= pairs


def test_ranges_of_pairs_are_even_where_files_have_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maxlm.corpus.dedup.pairs._SAMPLES", 10)
    pairs = np.random.default_rng(0).integers(0, 2**63, (60, 41), np.uint64)
    files = [tmp_path / str(i) for i in range(len(pairs))]
    for path, file_pairs in zip(files, pairs, strict=True):
        write_columns(path, {"pair": np.sort(file_pairs)})
    starts = find_pair_range_starts(files, 4)
    range_starts = np.searchsorted(np.sort(pairs.ravel()), starts)
    counts = np.diff([*range_starts, pairs.size])
    even_count = pairs.size / 4
    assert counts.max() < 1.5 * even_count
