"""``maxlm eval``: a model on lm-evaluation-harness's tasks and its result files; what
it makes of long contexts."""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast
from urllib.request import urlopen

import jax

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.chat import get_chat_template
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.evaluation.curves import compute_position_losses
from maxlm.inference.engine import Engine
from maxlm.inference.scoring import MaskedScorer, Scorer
from maxlm.models.architectures.encoder import Encoder
from maxlm.run.load import LoadedRun
from maxlm.runtime.files import convert_write_errors
from maxlm.runtime.json_types import JsonObject
from maxlm.runtime.progress import show_progress
from maxlm.serving.program import load_chat_model, make_engine

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.models.api_models import TemplateAPI

    from maxlm.evaluation.lm_eval_model import ResumableModel

HarnessModel = TypeVar("HarnessModel")
DEFAULT_MAX_LENGTH = 4096
"""Tokens that a model reads at once, if it can."""
ENGINE_TOKENS = 32_768
"""Tokens that sequences of an engine hold together, or one of them that is longer."""


@dataclass(frozen=True)
class _OpenModel:
    """A model to evaluate, and where its results go."""

    lm: Any
    """A client of the harness's, or :class:`MaxlmModel`."""
    name: str
    step: int | None
    """Of a run."""
    folder: Path
    answer_log: Path | None = None
    """File of a server's answers so far; None: the model is here."""


def evaluate_model(
    model: str,
    tasks: Sequence[str],
    settings: Sequence[str] = (),
    *,
    output: Path | None = None,
    mesh: str | None = None,
    step: int | None = None,
    template: Path | None = None,
    data: Path | None = None,
    shots: int | None = None,
    seed: int | None = None,
    chat: bool = False,
    limit: int | None = None,
    system: str | None = None,
) -> tuple[JsonObject, Path]:
    """Evaluates a model on tasks; writes ``results_TIME.json`` and
    ``samples_TASK_TIME.jsonl``.

    Args:
        model: a run's folder, a Hugging Face checkpoint's, or the URL of an
            OpenAI-compatible server, such as http://host:8000/v1.
        settings: the engine's, as ``max_sequences=32``; a server's: of the harness's
            client.
        output: folder of the files; default: ``evaluations`` in the run's or runs/NAME.
        data, shots, seed, chat, limit, system: of ``load_tasks`` and
            ``evaluate_tasks`` in :mod:`maxlm.evaluation.tasks`.

    Returns:
        The harness's dict of results, and the folder.
    """
    models, harness = import_harness()
    loaded_tasks = harness.load_tasks(tasks, data=data, shots=shots, seed=seed)
    is_server = model.startswith(("http://", "https://"))
    if is_server:
        evaluated = _open_served_model(model, settings, step, output, chat=chat)
        convert_errors = _convert_server_errors(model)
    else:
        loaded = load_chat_model(model, step=step, mesh=mesh, template=template)
        if chat:
            get_chat_template(loaded.tokenizer)  # refuses a model that has none
        lm = make_harness_model(loaded, models.MaxlmModel, settings, seed=seed or 0)
        evaluated = _describe_loaded_model(model, loaded, lm, output)
        convert_errors = nullcontext()

    task_names = [""]  # the last is that of the task under way
    with show_progress("requests") as progress, convert_errors:
        if jax.process_index() == 0:
            evaluated.lm.on_progress = lambda done, total: progress(
                task_names[-1], done, total
            )
        results = harness.evaluate_tasks(
            evaluated.lm,
            loaded_tasks,
            limit=limit,
            chat=chat,
            system=system,
            on_task=task_names.append,
        )
    seconds = results.pop("seconds_by_task")
    about: JsonObject = {
        "folder": model,
        "step": evaluated.step,
        "seconds": sum(seconds.values()),
        "seconds_by_task": seconds,
    }
    engine = getattr(evaluated.lm, "engine", None)
    if engine is not None:
        stats = engine.stats()
        about["prompt_tokens"] = stats.prompt_tokens_total
        about["generated_tokens"] = stats.generated_tokens_total
    results["maxlm"] = about
    if jax.process_index() == 0:
        write_results(evaluated.folder, results, evaluated.name)
        if evaluated.answer_log is not None:
            evaluated.answer_log.unlink(missing_ok=True)
    return results, evaluated.folder


def _open_served_model(
    url: str,
    settings: Sequence[str],
    step: int | None,
    output: Path | None,
    *,
    chat: bool,
) -> _OpenModel:
    client = open_server(url.rstrip("/"), settings, chat=chat)
    assert client.model is not None  # open_server has asked for one
    name = client.model
    folder = output or _name_evaluations_folder(name)
    answer_log = folder / "answers.jsonl"
    return _OpenModel(
        lm=resume_answers(client, answer_log),
        name=name,
        step=step,
        folder=folder,
        answer_log=answer_log,
    )


def _describe_loaded_model(
    path: str, loaded: LoadedRun, lm: Any, output: Path | None
) -> _OpenModel:
    """Says where the results of a model in the folder ``path`` go."""
    name = loaded.config.name
    is_run = (Path(path) / "config.yaml").exists()
    if output is not None:
        folder = output
    elif is_run:
        folder = Path(path, "evaluations", f"step-{loaded.step:06d}")
    else:
        folder = _name_evaluations_folder(name)
    step = loaded.step if is_run else None
    return _OpenModel(lm=lm, name=name, step=step, folder=folder)


def _name_evaluations_folder(model_name: str) -> Path:
    """Returns the folder of evaluations of a model that is no run here."""
    return Path("runs", model_name.rpartition("/")[2], "evaluations")


def import_harness() -> tuple[ModuleType, ModuleType]:
    """Imports :mod:`maxlm.evaluation.lm_eval_model` and ``tasks`` beside it, which load
    lm-evaluation-harness and keep it quiet."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        from maxlm.evaluation import lm_eval_model, tasks
    except ModuleNotFoundError as error:
        message = f"the package {error.name} is not installed"
        fix = "pip install 'maxlm[eval]'"
        raise MaxlmError(message, fix=fix) from None
    return lm_eval_model, tasks


def make_harness_model(
    loaded: LoadedRun,
    create: Callable[..., HarnessModel],
    settings: Sequence[str] = (),
    *,
    add_bos_token: bool | None = None,
    max_gen_toks: int = 256,
    seed: int = 0,
) -> HarnessModel:
    """Makes a ``MaxlmModel`` with an engine, or with an encoder's scorer; ``create`` is
    the class or its ``__init__``, which takes the other arguments."""
    if not isinstance(loaded.model, Encoder):
        return create(
            make_evaluation_engine(loaded, settings),
            add_bos_token=add_bos_token,
            max_gen_toks=max_gen_toks,
            seed=seed,
        )
    if settings:
        message = (
            f"{settings[0]} is for a model that generates text; this is an encoder"
        )
        raise MaxlmError(message, fix="leave it out")
    room = loaded.config.model.max_seq_len - len(loaded.tokenizer.prefix_ids) - 1
    return create(
        make_masked_scorer(loaded),
        tokenizer=loaded.tokenizer,
        max_length=room,
        add_bos_token=add_bos_token,
        max_gen_toks=max_gen_toks,
        seed=seed,
    )


def make_evaluation_engine(loaded: LoadedRun, settings: Sequence[str] = ()) -> Engine:
    """Makes an engine for ``MaxlmModel``, which compiles what it runs when it does."""
    length = min(loaded.config.model.max_seq_len, DEFAULT_MAX_LENGTH)
    # Pages of 16 tokens. Most sequences are short: 64 of 256 tokens, and what several
    # of them share.
    pages = max(2 * length, 64 * 256) // 16 + 1
    engine_settings = [
        f"max_length={length}",
        f"num_pages={pages}",
        "max_sequences=64",
        "max_chunks=64",
    ]
    if jax.process_count() > 1:
        # Of several hosts none may time its own steps: all run the same.
        engine_settings.append("decode_steps=1")
    return make_engine(loaded, [*engine_settings, *settings], warm_up="never")


def make_masked_scorer(loaded: LoadedRun) -> MaskedScorer:
    """Makes the scorer of an encoder, whose texts are whole documents."""
    assert isinstance(loaded.model, Encoder)
    tokenizer = loaded.tokenizer
    mask_id = getattr(loaded.config.task, "mask_id", None)
    if mask_id is None:
        mask_id = loaded.config.model.vocab_size - 1

    def wrap(tokens: list[int]) -> tuple[list[int], int]:
        size = len(tokenizer.prefix_ids)
        if tokens[:size] == [*tokenizer.prefix_ids]:  # where a text has no context
            return [*tokens, tokenizer.eos_id], 0
        return [*tokenizer.prefix_ids, *tokens, tokenizer.eos_id], size

    return MaskedScorer(
        loaded.model, loaded.params, loaded.mesh, mask_id=mask_id, wrap=wrap
    )


def open_server(
    url: str, settings: Sequence[str] = (), *, chat: bool = False
) -> "TemplateAPI":
    """Makes the harness's own client of an OpenAI-compatible server, for its first
    model.

    Args:
        settings: the client's. Log-likelihoods need ``tokenizer=FOLDER``, a Hugging
            Face tokenizer's, unless the server has one to ask, as vLLM's has.
        chat: ask by conversations, which have no log-likelihoods.
    """
    from lm_eval.api.registry import get_model
    from lm_eval.utils import check_remote_tokenizer_support, simple_parse_args_string

    kind = "local-completions"
    base_url = f"{url}/completions"
    if chat:
        kind = "local-chat-completions"
        base_url = f"{url}/chat/completions"
    client_class = cast("type[TemplateAPI]", get_model(kind))
    client_options = simple_parse_args_string(",".join(settings))
    client_options["base_url"] = base_url
    try:
        if "model" not in client_options:
            with urlopen(f"{url}/models", timeout=30) as answer:
                client_options["model"] = json.load(answer)["data"][0]["id"]
        if "tokenizer" not in client_options:
            has_tokenizer = not chat and check_remote_tokenizer_support(
                base_url, max_retries=1
            )
            backend = "remote" if has_tokenizer else "none"
            client_options.setdefault("tokenizer_backend", backend)
        client = client_class(**client_options)
    except (OSError, ValueError, LookupError, ModuleNotFoundError) as error:
        message = f"this server cannot be used ({error})"
        fix = "check the address, and the server"
        raise MaxlmError(message, where=url, fix=fix) from error

    def raise_needs_tokenizer(*_: object, **__: object) -> NoReturn:
        message = "log-likelihoods from a server need its tokenizer"
        raise MaxlmError(
            message, where=url, fix="tokenizer=FOLDER names one; leave --chat out"
        )

    if client.tokenizer is None:
        client.loglikelihood = raise_needs_tokenizer
        client.loglikelihood_rolling = raise_needs_tokenizer
    return client


def resume_answers(client: "LM", log: Path) -> "ResumableModel":
    """Wraps a client to keep answers in a file, and begin with those of a run that was
    cut off."""
    from maxlm.evaluation.lm_eval_model import ResumableModel

    with convert_write_errors(log):
        log.parent.mkdir(parents=True, exist_ok=True)
    resumed = ResumableModel(client, log)
    if resumed.dbdict:
        message = f"{log}: {len(resumed.dbdict):,} answers of a run that was cut off are taken"
        print(f"{message}; delete it to ask for all", file=sys.stderr)
    return resumed


@contextmanager
def _convert_server_errors(url: str) -> Iterator[None]:
    from aiohttp import ClientError

    try:
        yield
    except (OSError, ClientError) as error:
        # requests' errors are OSErrors, and name no file.
        if getattr(error, "filename", None):
            raise
        fix = "start it, and evaluate again: answers so far are kept"
        raise MaxlmError(
            f"the server does not answer ({error})", where=url, fix=fix
        ) from error


def write_results(folder: Path, results: JsonObject, model_name: str) -> None:
    """Writes results as ``lm_eval --output_path --log_samples``; takes ``samples`` out
    of them."""
    from lm_eval.loggers import EvaluationTracker

    samples = results.pop("samples")
    tracker = EvaluationTracker(output_path=str(folder))
    about = tracker.general_config_tracker
    about.model_name = model_name
    about.model_name_sanitized = ""
    about.model_source = "maxlm"
    with convert_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tracker.save_results_aggregated(results, samples)
        for task, rows in samples.items():
            tracker.save_results_samples(task, rows)
        # The tracker raises nothing itself: without its file this does.
        (folder / f"results_{tracker.date_id}.json").stat()


def evaluate_position_losses(
    model: str,
    text: Path,
    *,
    length: int | None,
    num_windows: int,
    step: int | None = None,
    mesh: str | None = None,
) -> dict[int, float]:
    """Computes a model's mean loss by position (``compute_position_losses``) over
    windows of a text file; ``length`` (tokens of a window), ``step`` and ``mesh``: of
    :func:`load_engine_for_length`."""
    engine = load_engine_for_length(model, length, step=step, mesh=mesh)
    assert engine.tokenizer is not None
    windows = cut_windows(engine.tokenizer, text, engine.config.max_length, num_windows)
    with show_progress("windows") as progress:
        return compute_position_losses(
            Scorer(engine),
            windows,
            lambda done: progress(model, done, len(windows)),
        )


def cut_windows(
    tokenizer: Tokenizer, text: Path, length: int, count: int
) -> list[list[int]]:
    """Returns up to ``count`` windows of a text file, each of ``length`` tokens with
    those that documents open with, evenly spread."""
    ids = tokenizer.encode(text.read_bytes())
    prefix = tokenizer.prefix_ids
    room = length - len(prefix)
    if room < 2 or len(ids) < room:
        message = f"{len(ids):,} tokens give no window of {length:,}"
        raise MaxlmError(
            message, where=str(text), fix="use a longer text, or another --length"
        )
    num_fitting = len(ids) // room
    count = min(count, num_fitting)
    windows = []
    for i in range(count):
        start = i * num_fitting // count * room
        windows.append([*prefix, *ids[start : start + room]])
    return windows


def load_engine_for_length(
    model: str, length: int | None, *, step: int | None = None, mesh: str | None = None
) -> Engine:
    """Loads a model to read sequences of ``length`` tokens, by default its
    ``max_seq_len``."""
    loaded = load_chat_model(model, step=step, mesh=mesh)
    length = length or loaded.config.model.max_seq_len
    max_sequences = max(1, min(16, ENGINE_TOKENS // length))
    settings = [f"max_length={length}", f"max_sequences={max_sequences}"]
    return make_engine(loaded, settings, warm_up="never")
