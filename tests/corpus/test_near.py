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
    found = words(text)
    return (
        {tuple(found[i : i + n]) for i in range(max(1, len(found) - n + 1))}
        if found
        else set()
    )


def jaccard(a: str, b: str) -> float:
    one, two = grams(a), grams(b)
    return len(one & two) / len(one | two) if one | two else 0.0


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
        for _ in range(random_.choice((0, 0, 1, 1, 2, 3, 8))):
            edited[random_.randrange(len(edited))] = random_.choice(WORDS).upper() + "!"
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
    made = make_corpus(tmp_path / "corpus", documents, shards, rows_per_group=50)
    add_labels(made, "quality", score=pa.array(scores))
    stage = NearStage(keep_by="quality.score", memory=memory, recall=0.9999, hashes=80)
    run_stage(stage, made, tmp_path / "scratch", workers)
    found = labels(made, stage).to_pylist()

    alike = {
        (i, j)
        for i, a in enumerate(documents)
        for j, b in enumerate(documents[:i])
        if a and b and jaccard(a, b) >= 0.8
    }
    assert len(alike) > 60
    for i, j in alike:
        assert found[i]["duplicate"] or found[j]["duplicate"]
        assert found[i]["cluster"] == found[j]["cluster"] is not None
    for i, each in enumerate(found):
        if each["duplicate"]:
            kept = int(each["of"][1:])
            assert not found[kept]["duplicate"]
            assert (scores[kept], -kept) > (scores[i], -i)
            assert each["jaccard"] == pytest.approx(
                jaccard(documents[i], documents[kept])
            )
            assert each["jaccard"] >= np.float32(0.8)
        else:
            assert each["of"] is each["jaccard"] is None
    sizes = [each["cluster"] for each in found if each["cluster"] is not None]
    assert all(
        each["cluster_size"]
        == (1 if each["cluster"] is None else sizes.count(each["cluster"]))
        for each in found[:-1]
    )
    assert list(dict.fromkeys(sizes)) == list(
        range(len(set(sizes)))
    )  # As they first appear.
    assert found[-1] == {"id": f"d{len(found) - 1}"} | dict.fromkeys(
        stage.schema().names
    )


@pytest.mark.parametrize("memory", [1 << 29, 1 << 11])
def test_a_run_that_stops_at_any_step_goes_on(tmp_path: Path, memory: int) -> None:
    documents = texts_with_copies(6, 20)
    stage = NearStage(hashes=12, recall=0.9, memory=memory)
    whole = make_corpus(tmp_path / "whole", documents)
    run_stage(stage, whole, tmp_path / "other")
    made = make_corpus(tmp_path / "corpus", documents)
    views = [replace(shard, output_stage="near") for shard in made]
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
    assert labels(made, stage).equals(labels(whole, stage))


def test_chains_of_likeness_delete_nothing_that_is_like_no_kept_document(
    tmp_path: Path,
) -> None:
    line = [f"word{i}" for i in range(200)]
    chain = [" ".join(line[start : start + 100]) for start in range(0, 100, 4)]
    assert jaccard(chain[0], chain[1]) >= 0.8
    assert jaccard(chain[0], chain[-1]) < 0.1
    made = make_corpus(tmp_path / "corpus", chain)
    stage = NearStage(recall=0.9999)
    run_stage(stage, made, tmp_path / "scratch")
    found = labels(made, stage)
    assert set(found["cluster_size"].to_pylist()) == {len(chain)}
    assert found["duplicate"].to_pylist() == [i % 3 > 0 for i in range(25)]


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
    made = make_corpus(
        tmp_path / "corpus", [" ".join(page) for page in pages], rows_per_group=200
    )
    stage = NearStage(max_group=20)
    run_stage(stage, made, tmp_path / "scratch")
    of = labels(made, stage)["of"].to_pylist()
    assert sum(of[600 + n] == f"d{i}" for n, i in enumerate(copies)) >= 59


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
    found = make_shingle_set(text, n).tolist()
    assert found == sorted(set(found))
    assert len(found) == len(grams(text.replace("\u00ad", ""), n))
    # Accents apart or joined, and format characters that are not seen, make no
    # difference.
    apart = "".join(
        each if each == "한" else unicodedata.normalize("NFD", each) for each in text
    )
    for each in (apart, "\u00ad".join(text), text.upper() if "ß" not in text else text):
        assert make_shingle_set(each, n).tolist() == found


@given(st.floats(0.1, 1), st.floats(0.5, 0.9999), st.integers(1, 512))
def test_bandings_keep_their_promise(
    similarity: float, recall: float, most: int
) -> None:
    bands, rows = choose_banding(similarity, recall, most)
    assert 1 - (1 - similarity**rows) ** bands >= recall - 1e-9
    assert rows == 1 or bands * rows <= most
    if similarity < 1:
        more = rows + 1
        needed = np.log(1 - recall) / np.log(1 - similarity**more)
        assert np.ceil(needed - 1e-6) * more > most or needed * more > most


@pytest.mark.parametrize(
    ("size", "limit"), [(2, 8), (8, 8), (9, 8), (500, 8), (500, 1000)]
)
def test_pairs_of_a_group(tmp_path: Path, size: int, limit: int) -> None:
    rank = np.random.default_rng(size).permutation(size).astype(float)
    write_columns(get_shard_path(tmp_path, "members", "s"), {"rank": rank})
    write_band_keys(
        tmp_path, "s", np.full((1, size), 7, np.uint64), np.ones(size, np.bool_)
    )
    members = SelectedDocuments(tmp_path, ("s",), (0, size))
    found = np.unique(np.concatenate([*find_candidate_pairs(members, 1, 1, 0, limit)]))
    low, high = unpack_pairs(found)
    assert (low < high).all()
    if size <= limit:
        assert len(found) == size * (size - 1) // 2
    else:
        assert len(found) <= size * limit // 2
        pairs = set(zip(low.tolist(), high.tolist(), strict=True))
        best = int(np.argmax(rank))
        assert all(
            (min(i, best), max(i, best)) in pairs for i in range(size) if i != best
        )


def test_ranges_of_pairs_are_even_where_files_have_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maxlm.corpus.dedup.pairs._SAMPLES", 10)
    pairs = np.random.default_rng(0).integers(0, 2**63, (60, 41), np.uint64)
    files = [tmp_path / str(i) for i in range(len(pairs))]
    for path, own in zip(files, pairs, strict=True):
        write_columns(path, {"pair": np.sort(own)})
    starts = find_pair_range_starts(files, 4)
    counts = np.diff([*np.searchsorted(np.sort(pairs.ravel()), starts), pairs.size])
    assert counts.max() < 1.5 * pairs.size / 4
