"""``maxlm eval``: a model on lm-evaluation-harness's tasks, and the result files."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import jax

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.chat import get_chat_template
from maxlm.inference.engine import Engine
from maxlm.programs.load import LoadedRun
from maxlm.programs.serve import load_chat_model, make_engine
from maxlm.runtime.files import convert_write_errors
from maxlm.runtime.progress import show_progress

DEFAULT_MAX_LENGTH = 4096
"""Tokens that a model reads at once, if it reads as many."""


def evaluate_model(
    model: str,
    tasks: Sequence[str],
    settings: Sequence[str] = (),
    *,
    output: Path | None = None,
    mesh: str | None = None,
    step: int | None = None,
    template: Path | None = None,
    **options: Any,
) -> tuple[dict[str, Any], Path]:
    """Evaluates a model on tasks; writes ``results_TIME.json`` and ``samples_TASK_TIME.jsonl``.

    Args:
        model: a run's folder, a Hugging Face checkpoint's, or the URL of an OpenAI-compatible
            server, such as http://host:8000/v1.
        settings: the engine's, as ``max_sequences=32``; a server's: of the harness's class.
        output: the folder of the files; default: in the run's, or runs/NAME/evaluations.
        options: see :func:`maxlm.evaluation.tasks.evaluate_tasks`.

    Returns:
        The harness's dict of results, and the folder.
    """
    try:
        from maxlm.evaluation.lm_eval_model import MaxlmModel
        from maxlm.evaluation.tasks import evaluate_tasks
    except ModuleNotFoundError as error:
        what, fix = f"the package {error.name} is not installed", "pip install 'maxlm[eval]'"
        raise MaxlmError(what, fix=fix) from None
    is_lead, engine, about = jax.process_index() == 0, None, {"folder": model, "step": step}
    with show_progress("requests") as progress:
        if model.startswith(("http://", "https://")):
            lm = _open_server(model, settings, chat=options.get("chat", False))
            name = lm.model
        else:
            loaded = load_chat_model(model, step=step, mesh=mesh, template=template)
            name, about["step"] = loaded.config.name, loaded.step
            if options.get("chat"):
                get_chat_template(loaded.tokenizer)
            if output is None and (Path(model) / "config.yaml").exists():
                output = Path(model, "evaluations", f"step-{loaded.step:06d}")
            engine = make_evaluation_engine(loaded, settings)
            lm = MaxlmModel(engine)
        current = ""

        def report(done: int, total: int) -> None:
            if is_lead:
                progress(current, done, total)

        def begin(task: str, loaded: dict[str, Any]) -> None:
            nonlocal current
            current = task

        lm.on_progress = report
        results = evaluate_tasks(lm, tasks, on_task=begin, **options)
    seconds = results.pop("seconds_by_task")
    about |= {"seconds": sum(seconds.values()), "seconds_by_task": seconds}
    if engine is not None:
        stats = engine.stats()
        about["prompt_tokens"] = stats.prompt_tokens_total
        about["generated_tokens"] = stats.generated_tokens_total
    results["maxlm"] = about
    folder = output or Path("runs", name.rpartition("/")[2], "evaluations")
    if is_lead:
        write_results(folder, results, name)
    return results, folder


def make_evaluation_engine(loaded: LoadedRun, settings: Sequence[str] = ()) -> Engine:
    """Makes an engine for ``MaxlmModel``; ``max_length`` of the settings is the tokens that the
    model reads at once."""
    length = f"max_length={min(loaded.config.model.max_seq_len, DEFAULT_MAX_LENGTH)}"
    return make_engine(loaded, [*map(_add_room, [length, *settings])], warm_up=False)


def _add_room(setting: str) -> str:
    """The engine's longest sequence has the token that is predicted last, and one to draw."""
    name, _, value = setting.partition("=")
    return f"max_length={int(value) + 2}" if name == "max_length" and value.isdigit() else setting


def _open_server(url: str, settings: Sequence[str], *, chat: bool) -> Any:
    """Makes the harness's own client of a server, for its first model."""
    from lm_eval.api.registry import get_model
    from lm_eval.utils import simple_parse_args_string

    url = url.rstrip("/")
    given = simple_parse_args_string(",".join(settings))
    kind, path = "local-completions", "completions"
    if chat:
        kind, path = "local-chat-completions", "chat/completions"
    try:
        if "model" not in given:
            with urlopen(f"{url}/models", timeout=30) as answer:
                given["model"] = json.load(answer)["data"][0]["id"]
        return get_model(kind)(base_url=f"{url}/{path}", **given)
    except (OSError, ValueError, LookupError, ModuleNotFoundError) as error:
        fix = (
            "check the address; tokenizer=FOLDER names a Hugging Face tokenizer for log-likelihoods"
        )
        raise MaxlmError(f"this server cannot be used ({error})", where=url, fix=fix) from error


def write_results(folder: Path, results: dict[str, Any], model_name: str) -> None:
    """Writes the files of results as ``lm_eval --output_path --log_samples`` does; takes
    ``samples`` out of them."""
    from lm_eval.loggers import EvaluationTracker

    samples = results.pop("samples")
    tracker = EvaluationTracker(output_path=str(folder))
    about = tracker.general_config_tracker
    about.model_name, about.model_name_sanitized, about.model_source = model_name, "", "maxlm"
    with convert_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tracker.save_results_aggregated(results, samples)
        for task, rows in samples.items():
            tracker.save_results_samples(task, rows)
        if not (folder / f"results_{tracker.date_id}.json").exists():  # it only logs errors
            raise OSError("the results could not be written")


def list_metrics(results: dict[str, Any]) -> Iterator[tuple[str, str, float, float | None, int]]:
    """Yields task, metric, value, standard error (None: there is none) and number of rows."""
    for task, found in results["results"].items():
        for key, value in found.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = found.get(f"{metric}_stderr,{filtered}")
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            rows = found.get("sample_count", {}).get(key, found.get("sample_len", 0))
            yield task, name, value, error if isinstance(error, float) else None, rows
