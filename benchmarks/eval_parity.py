"""`maxlm eval`'s model beside lm-evaluation-harness's own HFLM, on the same weights and
rows.

    python benchmarks/eval_parity.py FOLDER DATA [N] [--tasks piqa,gsm8k:5]
    [--batch-size 16]

FOLDER is a Hugging Face checkpoint, DATA has the tasks' files (docs/evaluation.md). A
task may have its own number of rows. HFLM is torch in fp32 on the CPU. Each task is
evaluated by one after the other, so that both meet the same load; seconds are of the
evaluation alone, ours with compilation, but for programs that `maxlm eval` has compiled
before. HFLM's softmax is in float64: in fp32 its sum over the vocabulary is off by 8e-6
nats a token. Prints of each task how far log-likelihoods are apart, how many
generations differ, each metric of both, and the ratio of seconds. --float64 N: of the N
requests that are furthest apart, how far each model is from a float64 one (torch).
"""

import argparse
import logging
import os
import sys
import time
from pathlib import Path

os.environ["TQDM_DISABLE"] = os.environ["DISABLE_MULTIPROC"] = "1"

import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from maxlm.evaluation.lm_eval_model import MaxlmModel
from maxlm.evaluation.program import make_evaluation_engine
from maxlm.evaluation.tasks import load_tasks
from maxlm.serving.program import load_chat_model

TASKS = "arc_challenge,piqa,winogrande,lambada_openai,mmlu_anatomy,gsm8k:5"


def run(model, manager, name, data, limit, shots):
    shots = 5 if name.startswith("mmlu") else shots
    loaded = load_tasks([name], data=data, shots=shots, manager=manager)[name]
    start = time.perf_counter()
    results = evaluate(model, loaded, limit=limit, bootstrap_iters=0)
    return results, time.perf_counter() - start


def compare(theirs, ours):
    """Requests with both log-likelihoods; differing greedy flags, differing texts,
    requests."""
    scored = []
    flags = 0
    texts = 0
    count = 0
    for task, rows in theirs["samples"].items():
        for one, two in zip(rows, ours["samples"][task], strict=True):
            assert one["arguments"] == two["arguments"], (task, one["doc_id"])
            for arguments, their_responses, our_responses in zip(
                one["arguments"], one["resps"], two["resps"], strict=True
            ):
                their_first = their_responses[0]
                our_first = our_responses[0]
                count += 1
                if isinstance(their_first, str):  # a generated text
                    texts += their_first != our_first
                else:  # a log-likelihood, and whether it is greedy
                    scored.append((arguments, their_first[0], our_first[0]))
                    flags += their_first[1] != our_first[1]
    return scored, flags, texts, count


def score_in_float64(model, context, tail):
    """Log-likelihood of a tail in nats, by HFLM's model in float64."""
    context, tail = model._encode_pair(context, tail)
    with torch.no_grad():
        logits = model.model(torch.tensor([[*context, *tail][:-1]])).logits[
            0, -len(tail) :
        ]
    return torch.log_softmax(logits, -1)[range(len(tail)), tail].sum().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("data", type=Path)
    parser.add_argument("rows", type=int, nargs="?", default=40)
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument(
        "--shots", type=int, help="default: 5 for MMLU, else the task's"
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--softmax-dtype", default="float64")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--float64", type=int, default=0, metavar="N")
    options = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    theirs = HFLM(
        pretrained=options.folder,
        dtype="float32",
        device="cpu",
        batch_size=options.batch_size,
        max_length=options.max_length,
        softmax_dtype=options.softmax_dtype,
    )
    loaded = load_chat_model(options.folder, step=None, mesh=None, template=None)
    ours = MaxlmModel(
        make_evaluation_engine(loaded, [f"max_length={options.max_length}"])
    )
    manager = TaskManager()
    differs = False
    furthest = {}
    for spec in options.tasks.split(","):
        name, _, rows = spec.partition(":")
        limit = int(rows or options.rows)
        task = (manager, name, options.data, limit, options.shots)
        their_results, their_seconds = run(theirs, *task)
        our_results, our_seconds = run(ours, *task)
        scored, flags, texts, count = compare(their_results, our_results)
        scored.sort(key=lambda request: -abs(request[1] - request[2]))
        furthest[name] = scored[: options.float64]
        apart = np.array([abs(x - y) for _, x, y in scored] or [0.0])
        metrics = {
            k: v
            for k, v in their_results["results"][name].items()
            if "," in k and "stderr" not in k
        }
        pairs = {k: (v, our_results["results"][name][k]) for k, v in metrics.items()}
        same = all(np.isclose(x, y, rtol=1e-5) for x, y in pairs.values())
        differs |= not same or flags > 0 or texts > 0 or apart.max() > 1e-3
        shown = ", ".join(f"{k} {x:.4f} {y:.4f}" for k, (x, y) in pairs.items())
        print(
            f"{name}: {limit} rows, {count} requests; |Δll| ≤ {apart.max():.1e} nats, "
            f"{np.mean(apart <= 1e-4):.1%} ≤ 1e-4, median {np.median(apart):.0e}; "
            f"{flags} greedy "
            f"flags and {texts} texts differ; HFLM, maxlm: {shown}; {their_seconds:.1f} s, "
            f"{our_seconds:.1f} s, "
            f"ratio {our_seconds / their_seconds:.2f}",
            flush=True,
        )
    theirs.model.double()
    for name, rows in furthest.items():
        if rows:
            exact = np.array(
                [score_in_float64(theirs, *arguments) for arguments, _, _ in rows]
            )
            errors = (
                np.abs(np.array([row[i] for row in rows]) - exact).max() for i in (1, 2)
            )
            print(
                "{}: from float64 HFLM ≤ {:.1e}, maxlm ≤ {:.1e} nats".format(
                    name, *errors
                )
            )
    sys.exit(int(differs))


if __name__ == "__main__":
    main()
