"""How much a recipe found of the cases planted in the demonstration's crawl.

    python benchmarks/corpus_truth.py corpora/demo corpora/demo-crawl/truth.jsonl

Both come from `make corpus-demo`. The crawl's maker writes the truth, and no stage reads
it.
"""

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from maxlm.corpus.cuts import remove_spans
from maxlm.corpus.opened import OpenCorpus, mark_kept

COLUMNS = (
    *("id", "text", "exact.duplicate", "exact.of", "near.duplicate", "near.of"),
    *("near.cluster", "substring.cuts", "pii.spans"),
)
_PII = {"ipv4": "ip", "ipv6": "ip", "credit_card": "card", "us_ssn": "ssn"}


def documents(corpus: OpenCorpus) -> dict[str, dict[str, Any]]:
    """Every document's labels, by id, and whether it is kept: copies as the stages
    found them, cuts as they are among what the rules keep."""
    rules = corpus.resolve_rules()
    settled_names = list(dict.fromkeys(["text", *rules.label_names, "substring.cuts"]))
    rows = {}
    for shard, settled in zip(corpus.shards, corpus.settle_rules(rules), strict=True):
        tables = zip(
            shard.read_row_groups(COLUMNS),
            settled.read_row_groups(settled_names),
            strict=True,
        )
        for columns, table in tables:
            cuts = table.column("substring.cuts").to_pylist()
            is_kept = mark_kept(table, rules).tolist()
            for row, spans, keep in zip(
                columns.to_pylist(), cuts, is_kept, strict=True
            ):
                rows[row["id"]] = row | {"substring.cuts": spans, "kept": keep}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("truth", type=Path)
    arguments = parser.parse_args()
    corpus = OpenCorpus.open(arguments.corpus)
    rows = documents(corpus)
    truth = defaultdict(list)
    for line in arguments.truth.read_text().splitlines():
        record = json.loads(line)
        truth[record["kind"]].append(record)

    def share(name: str, count: int, total: int) -> None:
        print(f"{name:58} {count:5} of {total:5}  {count / max(1, total):7.2%}")

    copies = [
        record
        for record in truth["exact_copy"]
        if (rows[record["id"]]["text"] or "").strip()
    ]
    pairs = [(rows[record["id"]], rows[record["of"]]) for record in copies]
    marked = sum(bool(a["exact.duplicate"] or b["exact.duplicate"]) for a, b in pairs)
    share("exact copies, one of the two marked", marked, len(pairs))
    for low, high in ((0.8, 1.0), (0.0, 0.8)):
        alike = [
            record for record in truth["edited_copy"] if low <= record["jaccard"] < high
        ]
        pairs = [(rows[record["id"]], rows[record["of"]]) for record in alike]
        marked = sum(any(x["near.duplicate"] for x in pair) for pair in pairs)
        share(
            f"edited copies at {low:.1f} to {high:.1f}, one of the two marked",
            marked,
            len(pairs),
        )
    left = times = 0
    for record in truth["boilerplate"]:
        row = rows[record["id"]]
        if not row["kept"] or record["text"] not in row["text"]:
            continue
        spans = [(span["start"], span["end"]) for span in row["substring.cuts"] or ()]
        times += 1
        left += record["text"] in remove_spans(row["text"], spans)
    share("repeated paragraph in kept documents, cut (one stays)", times - left, times)
    masked_counts = Counter()
    for record in truth["pii"]:
        row = rows[record["id"]]
        if row["pii.spans"] is None:
            continue
        masked = Counter(span["kind"] for span in row["pii.spans"])
        for kind, value in record["spans"]:
            masked_counts[kind, "all"] += 1
            masked_counts[kind, "masked"] += (
                value not in row["text"] and masked[_PII.get(kind, kind)] > 0
            )
    for kind in sorted({kind for kind, _ in masked_counts}):
        share(
            f"personal data, {kind}",
            masked_counts[kind, "masked"],
            masked_counts[kind, "all"],
        )
    for reason, number in Counter(record["reason"] for record in truth["junk"]).items():
        dropped = sum(
            not rows[record["id"]]["kept"]
            for record in truth["junk"]
            if record["reason"] == reason and record["id"] in rows
        )
        share(f"junk, {reason}", dropped, number)
    taken = [
        record for record in (*truth["page"], *truth["article"]) if record["id"] in rows
    ]
    share(
        "pages and articles kept",
        sum(rows[record["id"]]["kept"] for record in taken),
        len(taken),
    )
    counts = corpus.read_manifest("documents")["counts"]
    share("broken places counted", counts.get("broken", 0), len(truth["broken"]))
    bombs = sum(record["reason"] == "bomb" for record in truth["edge"])
    share("zip bombs passed over", counts.get("too_large", 0), bombs)


if __name__ == "__main__":
    main()
