"""The peer's side of `corpus_dedup.py`: datatrove's MinHash deduplication, in its own
environment.

    PYTHON corpus_dedup_peer.py DOCUMENTS.jsonl FOLDER {spacy,whitespace}

Prints as JSON: CPU seconds of the signature stage alone and of its four stages on one
core, and how many documents it keeps. DOCUMENTS.jsonl has one {"text": ..., "id": ...}
a line.
"""

import json
import sys
import time
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.logging import logger
from datatrove.utils.word_tokenizers import WhitespaceTokenizer


def main() -> None:
    documents = Path(sys.argv[1])
    folder = sys.argv[2]
    tokenizer = sys.argv[3]
    logger.remove()
    config = MinhashConfig()  # 14 bands of 8: it finds 92% at a similarity of 0.8.

    def run(*pipeline, tasks: int = 1) -> None:
        executor = LocalPipelineExecutor(
            list(pipeline), tasks=tasks, workers=1, skip_completed=False
        )
        for rank in range(
            tasks
        ):  # Without its processes, so that all time is this one's.
            executor._run_for_rank(rank, rank)

    reader = JsonlReader(str(documents.parent), glob_pattern=documents.name)
    signature = MinhashDedupSignature(f"{folder}/signatures", config)
    if tokenizer == "whitespace":
        signature.word_tokenizer = WhitespaceTokenizer()
    signature.get_shingles("the tokenizer is loaded at its first text")
    seconds = [time.process_time()]
    run(reader, signature)
    seconds.append(time.process_time())
    run(
        MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets", config=config),
        tasks=14,
    )
    run(MinhashDedupCluster(f"{folder}/buckets", f"{folder}/remove", config))
    writer = JsonlWriter(f"{folder}/kept", compression=None)
    run(reader, MinhashDedupFilter(f"{folder}/remove"), writer)
    seconds.append(time.process_time())
    lines = sum(
        len(p.read_text().splitlines()) for p in Path(f"{folder}/kept").glob("*.jsonl")
    )
    print(
        json.dumps(
            {
                "signature": seconds[1] - seconds[0],
                "all": seconds[2] - seconds[0],
                "kept": lines,
            }
        )
    )


if __name__ == "__main__":
    main()
