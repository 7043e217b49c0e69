"""The heuristics stage beside datatrove's Gopher, C4 and FineWeb filters, on the same
documents.

    pip install 'maxlm[corpus]' datatrove 'xxhash<4' spacy regex python
    benchmarks/corpus_heuristics.py DOCUMENTS... [--documents 500] [--characters 3000]

DOCUMENTS are files or folders of English text (text, JSONL with "text", Parquet; or
`python-stdlib`). CPU seconds of one process, the best of several alternating rounds.
datatrove is timed twice: every filter on every document, which is what the labels of
this stage amount to, and as a pipeline, where a document that one filter drops does not
reach the next. Its filters share the words of a document through a cache, as they do in
a pipeline. Below, how often the published expressions over our labels and its filters
agree: with its own words, and with the words of `maxlm.corpus.text` handed to it.
"""

import argparse
import sys
import time
from collections.abc import Callable
from itertools import islice

import numpy as np
import pyarrow as pa

from maxlm.corpus.expression import Expression
from maxlm.corpus.stages.heuristics import PUBLISHED, HeuristicsStage
from maxlm.corpus.text import split_words_and_symbols
from maxlm.data.documents.config import SourceConfig
from maxlm.data.documents.reader import read_documents


def peer_filters() -> dict[str, Callable[[str], bool]]:
    """datatrove's filters by the names of `PUBLISHED`: whether a text is kept."""
    from datatrove.data import Document  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.filters import (  # pyright: ignore[reportMissingImports]
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )

    def keeps(document_filter) -> Callable[[str], bool]:
        return lambda text: document_filter.filter(Document(text=text, id="")) is True

    return {
        "gopher_quality": keeps(GopherQualityFilter()),
        "gopher_repetition": keeps(GopherRepetitionFilter()),
        "c4": keeps(C4QualityFilter()),
        "fineweb": keeps(FineWebQualityFilter()),
    }


def take_our_words() -> None:
    """From here on datatrove's filters split texts as we do."""
    for name, module in list(sys.modules.items()):
        if name.startswith("datatrove.pipeline.filters") and hasattr(
            module, "split_into_words"
        ):
            module.split_into_words = lambda text, language=None: (
                split_words_and_symbols(text)
            )  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument(
        "--characters", type=int, default=3000, help="most of a document"
    )
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    config = SourceConfig(documents=tuple(arguments.paths), on_bad_bytes="replace")
    documents = islice(read_documents(config), arguments.documents)
    texts = [document.text.decode()[: arguments.characters] for document in documents]
    size = sum(len(text.encode()) for text in texts) / 1e6
    filters = peer_filters()
    batch = pa.RecordBatch.from_pydict({"text": pa.array(texts, pa.large_string())})
    label = HeuristicsStage().make_batch_label_fn()
    label(batch.slice(0, 1))  # Imports.
    for keeps in filters.values():
        keeps(texts[0])  # Loads.

    calls: dict[str, Callable[[], object]] = {
        "datatrove, all filters": lambda: [
            [k(text) for k in filters.values()] for text in texts
        ],
        "datatrove, pipeline": lambda: [
            all(k(text) for k in filters.values()) for text in texts
        ],
        "maxlm, all labels": lambda: label(batch),
    }
    times: dict[str, float] = dict.fromkeys(calls, float("inf"))
    for _ in range(arguments.rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name] = min(times[name], time.process_time() - start)

    print(f"{len(texts)} documents, {size:.1f} MB; CPU time of one core")
    print(f"{'':26}{'docs/s':>9}{'MB/s':>8}{'ratio':>8}")
    for name, spent in times.items():
        ratio = times["datatrove, all filters"] / spent
        print(f"{name:26}{len(texts) / spent:9.0f}{size / spent:8.1f}{ratio:8.1f}")
    labels = label(batch)
    names = [f"heuristics.{name}" for name in labels.schema.names]
    table = pa.Table.from_batches([labels]).rename_columns(names)
    ours = {name: Expression(PUBLISHED[name]).evaluate(table) for name in filters}
    theirs = {
        name: np.array([k(text) for text in texts]) for name, k in filters.items()
    }
    take_our_words()
    on_ours = {
        name: np.array([k(text) for text in texts])
        for name, k in peer_filters().items()
    }
    print(f"\n{'kept':26}{'maxlm':>9}{'datatrove':>10}{'agree':>8}{'on our words':>14}")
    for name in filters:
        our_share = ours[name].mean()
        peer_share = theirs[name].mean()
        agree, same = (
            (ours[name] == other[name]).mean() for other in (theirs, on_ours)
        )
        print(f"{name:26}{our_share:9.3f}{peer_share:10.3f}{agree:8.3f}{same:14.3f}")


if __name__ == "__main__":
    main()
