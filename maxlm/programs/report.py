"""What a finished run tells its owner: how good the model is, and where everything lies."""

import gzip
import lzma
from collections.abc import Iterator
from pathlib import Path

import jax

from maxlm.data.store import TokenStore
from maxlm.data.tokenizer import Tokenizer
from maxlm.inference.generate import generate
from maxlm.programs.pretrain import Trained, weights


def report(run: Trained) -> None:
    """Print held-out bits per byte beside two compressors', samples, and the run's files.

    Only process 0 prints; samples need the whole model on this process's devices and are left out
    where several processes share it.
    """
    if jax.process_index() != 0:
        return
    from rich.console import Console

    console = Console(highlight=False)
    if run.heldout:
        console.print(_comparison(run))
    if jax.process_count() == 1 and run.setup.config.samples.prompts:
        text = samples(run)
        path = run.folder / "samples" / f"step-{int(run.state.step)}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        console.print(text, markup=False)
    console.print(_places(run.folder), markup=False)


def _comparison(run: Trained):
    from rich.table import Table

    table = Table(title="Held-out text: bits per byte (lower is better)", title_justify="left")
    for column in ("source", "bytes", "maxlm", "gzip -9", "xz -9"):
        table.add_column(column, justify="left" if column == "source" else "right")
    for name, result in run.heldout.items():
        store = run.corpus.heldout[name]
        text = b"".join(texts(store, run.corpus.tokenizer))
        packed = (gzip.compress(text, 9, mtime=0), lzma.compress(text, preset=9))
        rivals = (f"{8 * len(p) / len(text):.3f}" for p in packed)
        table.add_row(name, f"{len(text):,}", f"{result['bits_per_byte']:.3f}", *rivals)
    return table


def texts(store: TokenStore, tokenizer: Tokenizer) -> Iterator[bytes]:
    """The documents of a store, byte for byte."""
    for index in range(store.num_documents):
        yield tokenizer.decode_bytes(store.document(index)[1:-1].tolist())


def samples(run: Trained) -> str:
    """One continuation of each of the run's prompts, each under a rule."""
    config, tokenizer = run.setup.config.samples, run.corpus.tokenizer
    prompts = [[tokenizer.bos_id, *tokenizer.encode(p)] for p in config.prompts]
    continuations: list[list[int]] = [[] for _ in prompts]
    with jax.set_mesh(run.setup.mesh):
        steps = generate(
            run.setup.model,
            weights(run.state),
            prompts,
            config,
            eos_id=tokenizer.eos_id,
            key=jax.random.key(config.seed),
        )
        for step in steps:
            for row, token in enumerate(step):
                if token is not None and token != tokenizer.eos_id:
                    continuations[row].append(token)
    blocks = [
        f"──── sample {number} ────\n{prompt}{tokenizer.decode(tokens)}"
        for number, (prompt, tokens) in enumerate(
            zip(config.prompts, continuations, strict=True), start=1
        )
    ]
    return "\n\n".join(blocks) + "\n"


def _places(folder: Path) -> str:
    kinds = {
        "config.yaml": "the run, resolved",
        "checkpoints": "the model and its optimizer",
        "tokenizer": "text to ids",
        "data": "token stores",
        "metrics.jsonl": "every step's numbers",
        "tensorboard": f"the same: tensorboard --logdir {folder}",
        "plots/loss.png": "the loss",
        "samples": "what is printed above",
    }
    there = {name: what for name, what in kinds.items() if (folder / name).exists()}
    width = max(len(str(folder / name)) for name in there)
    lines = [f"  {folder / name!s:<{width}}  {what}" for name, what in there.items()]
    return "\n".join(["Everything is in", *lines, f'Try: maxlm generate {folder} "your prompt"'])
