"""How well a model predicts held-out text, in units that do not depend on its tokenizer."""

import math
from collections.abc import Callable
from typing import Any

from maxlm.programs.feed import evaluation_batches
from maxlm.programs.prepare import Corpus
from maxlm.programs.setup import Setup
from maxlm.train.loop import evaluate
from maxlm.train.step import Batch, Sums

EvalStep = Callable[[Any, Batch], Sums]
"""(parameters, batch) -> sums; see ``maxlm.train.step.eval_step``."""


def held_out(
    setup: Setup,
    step: EvalStep,
    params: Any,
    corpus: Corpus,
    max_batches: int | None = None,
) -> dict[str, dict[str, float]]:
    """Each held-out source's ``loss`` (nats a predicted token, or the task's own) and, where every
    token is predicted, ``bits_per_byte``.

    Documents are cut into sequences, each predicted without what came before. Every token but a
    document's first is predicted, its end-of-text token among them; the bits of all are divided
    by the bytes of text. After ``max_batches`` bytes are estimated from the store's own ratio of
    bytes to tokens.
    """
    results = {}
    for name, source in corpus.evaluation.items():
        with evaluation_batches(setup, source, max_batches) as batches:
            sums = evaluate(step, params, batches)
        loss = sums.get("cross_entropy", sums["loss"]) / sums["tokens"]
        result = {"loss": loss, "tokens": sums["tokens"]}
        if setup.config.task.predicts_every_token:
            store = corpus.heldout[name]
            predictable = store.num_tokens - store.num_documents
            text_bytes = store.manifest.text_bytes * sums["tokens"] / predictable
            bits = sums["cross_entropy"] / math.log(2)
            result |= {"bits_per_byte": bits / text_bytes, "bytes": text_bytes}
        results[name] = result
    return results
