"""A teacher's files for distillation: log-probabilities of its likeliest tokens, and
answers."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from maxlm.config import MaxlmError
from maxlm.config.load import load_config
from maxlm.config.sampling import SamplingConfig
from maxlm.data.conversations import get_column, read_template_variables
from maxlm.data.documents.streams import import_pyarrow
from maxlm.data.row_files import open_rows
from maxlm.data.rows import encode_row
from maxlm.data.tokenizer.chat import check_tools_are_written, encode_chat
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.data.tokenizer.prompts import encode_prompts
from maxlm.inference.embedding import compute_padded_states, iterate_padded_batches
from maxlm.inference.requests import GenerationRequest
from maxlm.models.architectures import Model
from maxlm.models.params import Params, bind
from maxlm.parallel.divergence import StoredTeacher, compute_top_log_probs
from maxlm.run.load import LoadedRun
from maxlm.runtime.files import convert_write_errors, replace_file
from maxlm.runtime.json_types import JsonObject
from maxlm.runtime.progress import show_progress
from maxlm.serving.program import load_chat_model, make_engine
from maxlm.sharding import bind_mesh
from maxlm.tasks.distillation import write_stored_teacher
from maxlm.tasks.sft import SftTask

_BLOCK_ROWS = 256
"""Rows that are held, and written together."""


def store_teacher_logits(
    model: str,
    files: Sequence[str | Path],
    out: Path,
    *,
    k: int = 64,
    temperature: float = 1.0,
    seq_len: int | None = None,
    settings: Sequence[str] = (),
    mesh: str | None = None,
    step: int | None = None,
) -> tuple[int, int]:
    """Writes the rows of files with what a teacher says of each token to learn: the
    log-probabilities of its ``k`` likeliest tokens and of all others together, 8·k + 4
    bytes a token. The task ``distill`` reads them, without a teacher. Raises
    MaxlmError: a file of another name, a model or a row that cannot be read.

    Args:
        model: a run's folder, or a Hugging Face checkpoint's.
        out: .arrow file of the rows, in the files' order, which memory is mapped to.
        seq_len: tokens of a row at most; default: the model's.
        settings: those of the task sft that say what of a row is learnt, as
            ``turns=last``.
        mesh: such as ``tensor=2``, with context=1; default: one device.

    Returns:
        Rows written, and rows left out.
    """
    if out.suffix != ".arrow":
        raise MaxlmError(
            "not the name of an Arrow file", where=str(out), fix="end it with .arrow"
        )
    pa = import_pyarrow(out)
    task = load_config(SftTask, None, settings).value
    file = open_rows(*files)
    loaded = load_chat_model(model, step=step, mesh=mesh)
    config = loaded.config.model
    if config.frontend is not None:
        message = "a teacher with a frontend, which reads tokens alone here"
        raise MaxlmError(message, where=str(model), fix="name a model of text")
    length = min(seq_len or config.max_seq_len, config.max_seq_len)
    encoder = task.make_encoder(loaded.tokenizer, length)
    metadata = {
        "teacher_vocab_size": config.vocab_size,
        "teacher_temperature": temperature,
    }
    num_rows = len(file)
    rows = pa.Table.from_struct_array(pa.array([file[i] for i in range(num_rows)]))
    num_written = 0
    writer = None
    with ExitStack() as stack:
        progress = stack.enter_context(show_progress("rows"))
        stack.enter_context(convert_write_errors(out))
        path = stack.enter_context(replace_file(out))
        for start in range(0, num_rows, _BLOCK_ROWS):
            stop = min(start + _BLOCK_ROWS, num_rows)
            # Rows by index, without those that the encoder leaves out.
            encoded_rows = {}
            for index in range(start, stop):
                encoded_row = encode_row(encoder, file, index)
                if encoded_row:
                    encoded_rows[index] = encoded_row
            records = _make_records(loaded, [*encoded_rows.values()], k, temperature)
            if records:
                table = rows.take([*encoded_rows])
                for name in records[0]:
                    column = pa.array([record[name] for record in records])
                    table = table.append_column(name, column)
                for name, value in metadata.items():
                    column = pa.array([value] * len(records))
                    table = table.append_column(name, column)
                # The first rows that fit tell the schema.
                if writer is None:
                    writer = stack.enter_context(
                        pa.ipc.new_stream(str(path), table.schema)
                    )
                writer.write_table(table)
            num_written += len(records)
            progress("teacher", stop, num_rows)
        if writer is None:
            message = f"no row has at most {encoder.max_length} tokens"
            fix = "raise seq_len"
            raise MaxlmError(message, where=str(files[0]), fix=fix)
    return num_written, num_rows - num_written


def _make_records(
    loaded: LoadedRun,
    encoded_rows: Sequence[Mapping[str, np.ndarray]],
    k: int,
    temperature: float,
) -> list[dict[str, bytes]]:
    """Returns what the teacher says of each row, of its tokens to learn alone."""
    row_tokens = [row["tokens"] for row in encoded_rows]
    row_tops = _find_top(loaded, row_tokens, k, temperature)
    records = []
    for row, top in zip(encoded_rows, row_tops, strict=True):
        places = np.flatnonzero(row["weights"])
        record = write_stored_teacher(
            top.ids[places], top.log_probs[places], row["targets"][places]
        )
        records.append(record)
    return records


def generate_answers(
    model: str,
    files: Sequence[str | Path],
    out: Path,
    *,
    num_answers: int = 1,
    settings: Sequence[str] = (),
    mesh: str | None = None,
    step: int | None = None,
    sampling: SamplingConfig | None = None,
) -> tuple[int, int]:
    """Writes a model's answers to the prompts of files as rows of prompt and completion
    (.jsonl), from which the task ``sft`` distils sequences.

    Args:
        files: rows with ``prompt``, or with ``messages``, whose last answer is left
            out.
        num_answers: to each prompt.
        settings: the engine's, as ``max_sequences=16``.
        sampling: how tokens are drawn; default: :class:`SamplingConfig`'s defaults.

    Returns:
        Answers written; those left out: empty, cut off, or to a prompt too long for the
        engine.
    """
    file = open_rows(*files)
    if sampling is None:
        sampling = SamplingConfig()
    loaded = load_chat_model(model, step=step, mesh=mesh)
    engine = make_engine(loaded, settings, warm_up="never")
    rows = [file[i] for i in range(len(file))]
    prompts = [_read_prompt(row, file.locate(i)) for i, row in enumerate(rows)]
    num_requested = len(prompts) * num_answers
    # By answer: (index of the row, number of the answer to it).
    texts: dict[tuple[int, int], str] = {}
    ended: set[tuple[int, int]] = set()
    num_done = 0

    def make_requests() -> Iterator[GenerationRequest]:
        for i, prompt in enumerate(prompts):
            tokens = _encode_prompt(loaded.tokenizer, prompt, rows[i])
            if len(tokens) < engine.config.max_length:
                yield GenerationRequest(str(i), tuple(tokens), sampling, num_answers)

    with (
        show_progress("answers") as progress,
        convert_write_errors(out),
        replace_file(out) as path,
    ):
        for output in engine.run(make_requests()):
            answer = (int(output.request_id), output.sequence_index)
            texts[answer] = texts.get(answer, "") + output.text
            if output.finish_reason is not None:
                num_done += 1
                progress("answers", num_done, num_requested)
                if output.finish_reason == "stop":
                    ended.add(answer)
        finished_answers = [answer for answer in sorted(ended) if texts[answer].strip()]
        with path.open("w", encoding="utf-8") as file_of_answers:
            for answer in finished_answers:
                row_index, _ = answer
                prompt_row = rows[row_index]
                row = {"prompt": prompts[row_index], "completion": texts[answer]}
                # They belong to the prompt.
                for name in ("tools", "chat_template_kwargs"):
                    if prompt_row.get(name):
                        row[name] = prompt_row[name]
                file_of_answers.write(json.dumps(row, ensure_ascii=False) + "\n")
    num_finished = len(finished_answers)
    return num_finished, num_requested - num_finished


def _encode_prompt(
    tokenizer: Tokenizer, prompt: str | list[JsonObject], row: JsonObject
) -> Sequence[int]:
    """Encodes a row's prompt, a text or messages to answer."""
    if isinstance(prompt, str):
        (tokens,) = encode_prompts(tokenizer, [prompt], as_documents=False)
        return tokens
    variables = read_template_variables(row)
    check_tools_are_written(tokenizer, prompt, **variables)
    variables["add_generation_prompt"] = True
    return encode_chat(tokenizer, prompt, **variables)


class _TopLogProbs(NamedTuple):
    """What a teacher says of each token of a row, on the host."""

    ids: np.ndarray
    """int32 [S, k]."""
    log_probs: np.ndarray
    """fp32 [S, k + 1], the last of all other tokens together."""


def _find_top(
    loaded: LoadedRun, rows: Sequence[np.ndarray], k: int, temperature: float
) -> list[_TopLogProbs]:
    """Finds the likeliest tokens behind each token of each row [S]; ``k`` of them, or as
    many as the teacher knows."""
    model_config = loaded.config.model
    num_top = min(k, model_config.vocab_size)
    num_batch_shards = prod(
        loaded.mesh.shape[axis] for axis in loaded.model.rules.batch
    )
    run = bind_mesh(loaded.mesh, _compute_top)
    batches = iterate_padded_batches(
        [row.tolist() for row in rows], model_config.max_seq_len, num_batch_shards
    )
    # Batches are of rows of like lengths, in another order than the rows'.
    row_tops: dict[int, _TopLogProbs] = {}
    for indices, tokens, lengths in batches:
        top = jax.device_get(
            run(loaded.model, num_top, temperature, loaded.params, tokens, lengths)
        )
        for place, index in enumerate(indices):
            length = lengths[place]
            row_tops[index] = _TopLogProbs(*(array[place, :length] for array in top))
    return [row_tops[index] for index in range(len(rows))]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _compute_top(
    model: Model,
    k: int,
    temperature: float,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
) -> StoredTeacher:
    bound = bind(model, params)
    hidden, _, _ = compute_padded_states(bound, model.rules, tokens, lengths)
    return compute_top_log_probs(
        bound.prepare_logits(hidden), k, temperature=temperature
    )


def _read_prompt(row: JsonObject, where: str) -> str | list[JsonObject]:
    """Returns a row's prompt, or its messages before the last answer."""
    if row.get("messages") is None:
        return get_column(row, "prompt")
    messages = row["messages"]
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise MaxlmError("no message to answer", where=where, fix="leave the row out")
    return messages
