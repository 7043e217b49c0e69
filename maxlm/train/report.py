"""The report of a finished run: how good the model is, and where its files are."""

import gzip
import lzma
from collections.abc import Callable
from statistics import median

import jax
from rich.console import Console, Group

from maxlm.data.store.store import TokenStore
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.inference.text import generate_text, get_prompt_separator
from maxlm.models.params import drop_auxiliary
from maxlm.optim.state import get_eval_params
from maxlm.plan.show import format_bytes, format_seconds, make_table
from maxlm.train.program import TrainingResult
from maxlm.train.records import read_records

# Compressors see at most this much of a source's held-out text: xz takes a second a
# megabyte.
COMPARED_BYTES = 16 << 20


def print_training_report(run: TrainingResult) -> None:
    """Print held-out bits per byte beside two compressors', samples, and the run's
    files.

    Only process 0 prints; samples need the whole model on this process's devices and
    are left out where several processes share it.
    """
    if jax.process_index() != 0:
        return
    console = Console(highlight=False)
    has_bits_per_byte = any(
        "bits_per_byte" in result for result in run.heldout.values()
    )
    if has_bits_per_byte:
        console.print(_compare_with_compressors(run))
    else:
        for name, result in run.heldout.items():
            figures = [
                f"{key} {value:.4g}" for key, value in result.items() if key != "tokens"
            ]
            console.print(f"held out ({name}): {' · '.join(figures)}", markup=False)
    comparison = _compare_with_plan(run)
    if comparison is not None:
        console.print(comparison)
    if jax.process_count() == 1 and run.setup.config.samples.prompts:
        text = generate_samples(run)
        path = run.folder / "samples" / f"step-{int(run.state.step)}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        console.print(text, markup=False)
    console.print(_list_files(run), markup=False)


def _compare_with_compressors(run: TrainingResult) -> Group:
    columns = ("source", "bytes", "maxlm", "gzip -9", "xz -9")
    rows = []
    for name, result in run.heldout.items():
        text = _read_text(run.data.heldout_stores[name], run.data.tokenizer)
        gzip_bits = 8 * len(gzip.compress(text, 9, mtime=0)) / len(text)
        xz_bits = 8 * len(lzma.compress(text, preset=9)) / len(text)
        row = (
            name,
            f"{result['bytes']:,.0f}",
            f"{result['bits_per_byte']:.3f}",
            f"{gzip_bits:.3f}",
            f"{xz_bits:.3f}",
        )
        rows.append(row)
    title = "Held-out text: bits per byte (lower is better)"
    return make_table(title, columns, rows, right=columns[1:])


def _compare_with_plan(run: TrainingResult) -> Group | None:
    """Compares the plan's figures with medians of what was measured; None: there is
    nothing to compare."""
    # The first step of a start compiles; those before it may be another machine's.
    records = [
        record
        for record in read_records(run.folder / "metrics.jsonl")
        if record.get("seconds") and record["step"] > run.start_step + 1
    ]
    plan = run.plan
    if plan.step_seconds is None or not records:
        return None
    step_seconds = median(record["seconds"] for record in records)
    mfu = median(record.get("mfu") or 0.0 for record in records)
    rows = [
        _compare("step", plan.step_seconds, step_seconds, format_seconds),
        _compare("MFU", plan.mfu() or 0.0, mfu, "{:.1%}".format),
    ]
    if "device_memory_peak" in records[-1]:
        peak = max(record["device_memory_peak"] for record in records)
        memory = plan.peak_bytes
        rows.append(_compare("memory of a device", memory, peak, format_bytes))
    columns = ("", "planned", "median", "planned ÷ measured")
    return make_table("Planned and measured", columns, rows, right=columns[1:])


def _compare(
    name: str, planned: float, measured: float, format_value: Callable[[float], str]
) -> tuple[str, str, str, str]:
    ratio = f"{planned / measured:.2f}" if measured else ""
    return (name, format_value(planned), format_value(measured), ratio)


def _read_text(store: TokenStore, tokenizer: Tokenizer) -> bytes:
    """Reads the beginning of a store's text, byte for byte if the tokenizer is
    lossless."""
    text = bytearray()
    for index in range(store.num_documents):
        if len(text) >= COMPARED_BYTES:
            break
        text += tokenizer.decode_bytes(store.text_tokens(index).tolist())
    return bytes(text)


def generate_samples(run: TrainingResult) -> str:
    """Generates one continuation of each of the run's prompts, each under a rule."""
    config = run.setup.config.samples
    model, shardings = run.setup.place_to_generate()
    params = jax.device_put(drop_auxiliary(get_eval_params(run.state)), shardings)
    # Each step has a piece of text for each prompt.
    steps = generate_text(model, params, run.data.tokenizer, config.prompts, config)
    continuations = ["".join(pieces) for pieces in zip(*steps, strict=True)]
    separator = get_prompt_separator(model)
    blocks = []
    samples = zip(config.prompts, continuations, strict=True)
    for number, (prompt, text) in enumerate(samples, 1):
        blocks.append(f"──── sample {number} ────\n{prompt}{separator}{text}")
    return "\n\n".join(blocks) + "\n"


def _list_files(run: TrainingResult) -> str:
    folder = run.folder
    config = run.setup.config
    is_rl = config.task.command == "rl"
    descriptions = {
        "config.yaml": "the run, resolved",
        "plan.json": "what was planned",
        "checkpoints": "the model and its optimizer",
        "tokenizer": "text to ids",
        "data": "token stores",
        "metrics.jsonl": "every step's numbers",
        "tensorboard": f"the same: tensorboard --logdir {folder}",
        "plots/loss.png": "the loss",
        "plots/rollouts.png": "rewards, lengths and entropy",
        "samples": "answers with their rewards" if is_rl else "what is printed above",
    }
    names = [name for name in descriptions if (folder / name).exists()]
    width = max(len(str(folder / name)) for name in names)
    lines = [f"  {folder / name!s:<{width}}  {descriptions[name]}" for name in names]
    # Neither an encoder nor a model with another head generates text.
    if config.model.transformer_type != "encoder" and not config.task.required_heads:
        chats = "chat_template.jinja" in run.data.tokenizer.extra_files
        verb = f"chat {folder}" if chats else f'generate {folder} "your prompt"'
        lines.append(f"Try: maxlm {verb}")
    if is_rl:
        lines.append(f"Look at it: maxlm rl report {folder}")
    return "\n".join(["Everything is in", *lines])
