"""The ``maxlm`` command: finds the verb, runs it, and prints a user's mistake as one
line.

A verb is one module here and one line in `VERBS`: a function ``command`` with Typer
annotations, whose docstring is its help (``subcommands``: functions that a first word
calls instead), or a group ``app = typer.Typer(...)``. It is imported only when it is
called, so that ``maxlm --help`` needs Typer alone, and its top imports neither JAX nor
data libraries. A mistake of the user raises `MaxlmError`; a run that ends badly raises
``typer.Exit(1)``; ``KeyboardInterrupt("saved step 120 in runs/x")`` ends with that line
and code 130.
"""

import gc
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import typer
from typer import Option
from typer.core import TyperGroup
from typer.main import get_command, get_group

P = ParamSpec("P")
ResultT = TypeVar("ResultT")
# Verb → its line of help.
VERBS = {
    "train": "Train a model, or resume a run.",
    "tune": "Tune a pretrained model: to answer, to prefer, to score, to imitate.",
    "rl": "Train a policy on its own answers, by rewards or by a teacher.",
    "smoke": "Check on this device, in a minute, that a config works.",
    "plan": "Show a run's memory, communication and time before it starts.",
    "runs": "List runs; show how far one is and where its time went.",
    "launch": "Print or submit a cluster scheduler's job.",
    "generate": "Continue a prompt with a trained model.",
    "chat": "Chat with a model in the terminal.",
    "serve": "Serve a model over HTTP, by OpenAI's protocol, with a chat page.",
    "eval": "Evaluate a model on tasks of lm-evaluation-harness.",
    "quantize": "Round a model's matrices to int8, fp8, int4, NF4 and others.",
    "convert": "Turn a Hugging Face checkpoint into a run, or a run into one.",
    "tokenizer": "Train, import and try tokenizers.",
    "corpus": "Clean and label documents, and turn them into token stores.",
    "config": "Show configs, the source of each value, and their schema.",
}


class LazyGroup(TyperGroup):
    """Lists verbs by their one line of help; imports a verb's module when it is
    called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name not in VERBS:
            return name, command, rest
        module: Any = importlib.import_module(f"maxlm.cli.{name}")
        function_or_group = module.app if hasattr(module, "app") else module.command
        subcommands = getattr(module, "subcommands", {})
        if rest and rest[0] in subcommands:
            function_or_group = subcommands[rest[0]]
            name = f"{name} {rest[0]}"
            rest = rest[1:]
        return name, _build_command(name, function_or_group), rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            message = str(interrupt) or "interrupted"
            print(f"\n{message}", file=sys.stderr)
            raise typer.Exit(130) from None


def make_app() -> typer.Typer:
    """Build the application; its verbs are not imported yet."""
    app = typer.Typer(
        name="maxlm",
        cls=LazyGroup,
        help="Train, inspect and serve language models from one JAX codebase.",
        epilog="See maxlm VERB --help. Settings follow a config, as key.path=value.",
        invoke_without_command=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def root(
        ctx: typer.Context,
        version: bool = Option(False, "--version", help="Print the version and exit."),
    ) -> None:
        if version:
            from maxlm import __version__

            print(f"maxlm {__version__}")
        elif ctx.invoked_subcommand is None:
            print(ctx.get_help())
        else:
            return
        raise typer.Exit()

    for name, line in VERBS.items():
        app.command(name, help=line)(lambda: None)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows ``maxlm``; the process's own by default.

    Returns:
        The exit code: 0 done, 1 the work failed, 2 the user's mistake (one line on
        stderr), 75 a run that stopped on a signal and saved, 76 a run that lost a
        process, 130 interrupted. With MAXLM_TRACEBACK=1 in the environment mistakes
        raise instead.
    """
    shows_traceback = os.environ.get("MAXLM_TRACEBACK", "") not in ("", "0")
    if arguments is None:  # the process is ours alone
        # Imports make 150,000 objects that stay. Looking through them after every 700
        # new ones, the default of Python 3.11, takes a seventh of the time to start.
        gc.set_threshold(10_000, *gc.get_threshold()[1:])
        os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' own progress bars
        if not shows_traceback:
            # Orbax drops all errors but the first of a checkpoint; Python complains of
            # each.
            sys.unraisablehook = lambda event: None
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
            warnings.filterwarnings(
                "ignore", r"coroutine '[\w.<>]*serialize", RuntimeWarning
            )
    try:
        result = get_command(make_app()).main(
            arguments, prog_name="maxlm", standalone_mode=False
        )
    except Exception as error:
        # A mistake of the user is one line; anything else is a bug, and raised again.
        words = sys.argv[1:] if arguments is None else arguments
        message = None if shows_traceback else _explain(error, words)
        if message is None:
            raise
        print(message, file=sys.stderr)
        return getattr(error, "exit_code", 2)
    finally:
        if arguments is None:
            # The interpreter ends by searching for cycles: a third of a second.
            gc.freeze()
    return result if isinstance(result, int) else 0


def _build_command(
    name: str, function_or_group: Callable[..., Any] | typer.Typer
) -> Any:
    """Build the command of a verb, which refuses URLs among its paths."""
    if isinstance(function_or_group, typer.Typer):
        app = function_or_group
    else:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(name)(function_or_group)
    for verb in app.registered_commands:
        # Wrapped already: a group is one object, however often it is called.
        if verb.callback and not hasattr(verb.callback, "__wrapped__"):
            verb.callback = _with_local_paths(verb.callback)
    is_group = app is function_or_group
    command = get_group(app) if is_group else get_command(app)
    command.name = name
    return command


# Options and arguments that list paths of text. `text` of `tokenizer encode`, a string,
# is no path.
_PATH_LISTS = ("text", "positive", "negative")


def _with_local_paths(command: Callable[P, ResultT]) -> Callable[P, ResultT]:
    """Refuse URLs among the paths that a command is given."""

    @wraps(command)
    def checked(*positional: P.args, **arguments: P.kwargs) -> ResultT:
        from maxlm.config import check_local_path

        paths: list[str | Path] = []
        for name in _PATH_LISTS:
            value = arguments.get(name)
            if isinstance(value, list):
                paths += value
        paths += [value for value in arguments.values() if isinstance(value, Path)]
        for path in paths:
            check_local_path(path)
        return command(*positional, **arguments)

    return checked


def _explain(error: Exception, arguments: Sequence[str]) -> str | None:
    """Return the line for a mistake of the user's or of the machine; None for any other
    error."""
    # Typer carries its own copy of Click, whose exceptions have no public names.
    if type(error).__name__ == "NoArgsIsHelpError":
        return str(error)
    if hasattr(error, "format_message"):
        line = _explain_usage(error, arguments)
    else:
        from maxlm.config.errors import find_user_error

        known = find_user_error(error)
        if known is None:
            return None
        line = str(known)
    return f"error: {' '.join(line.split())}"


def _explain_usage(error: Any, arguments: Sequence[str]) -> str:
    """Return a usage error with the nearest names, or the help to read."""
    context = getattr(error, "ctx", None)
    option = getattr(error, "option_name", None)
    path = context.command_path if context else "maxlm"
    text = error.format_message().rstrip(".")
    fix = f"see '{path} --help'"
    if context is None or option is None or not text.startswith("No such option"):
        text = f"{text[:1].lower()}{text[1:]}"
        text = text.replace(". Did you mean", "; did you mean")
        if "did you mean" in text:
            return f"{path}: {text}"
        return f"{path}: {text}; {fix}"
    if error.possibilities:
        fix = f"did you mean {' or '.join(error.possibilities)}?"
    takes_settings = any(
        parameter.name == "settings" for parameter in context.command.params
    )
    if takes_settings:
        overrides = _find_overrides(option, arguments, context.command.name)
        if overrides:
            fix = f"a setting takes no dashes: {' or '.join(overrides[:3])}"
    return f"{path}: no such option {option}; {fix}"


# Verb → module and name of the config that its settings belong to; other verbs' are a
# run's.
_SETTINGS_CONFIGS = {
    "serve": ("maxlm.inference.engine_config", "EngineConfig"),
    "chat": ("maxlm.config.sampling", "SamplingConfig"),
}


def _find_overrides(option: str, arguments: Sequence[str], verb: str) -> list[str]:
    """Find settings of a verb, as ``key.path=value``, whose key is or ends like the
    option: ``--steps 5``."""
    from maxlm.config.explain import iterate_schema_keys
    from maxlm.config.keys import join_key

    module, name = _SETTINGS_CONFIGS.get(verb, ("maxlm.run.config", "RunConfig"))
    schema = getattr(importlib.import_module(module), name)
    value = _find_option_value(option, arguments) or "..."
    option_name = option.strip("-").replace("-", "_").replace(".", "_")
    keys = sorted(dict.fromkeys(iterate_schema_keys([schema])), key=len)
    overrides = []
    for key in keys:
        # `steps` and `train_steps` both name train.steps.
        endings = ["_".join(map(str, key[i:])) for i in range(len(key))]
        if option_name in endings:
            overrides.append(f"{join_key(key)}={value}")
    return overrides


def _find_option_value(option: str, arguments: Sequence[str]) -> str:
    """Find the value of an option, ``--name=value`` or ``--name value``; empty: it has
    none."""
    words: list[str] = []
    for argument in arguments:
        if argument.startswith("-"):
            words += argument.split("=", 1)
        else:
            words.append(argument)
    value = ""
    for word, next_word in zip(words, [*words[1:], ""], strict=True):
        if word == option:
            value = next_word
    return "" if value.startswith("-") else value


if __name__ == "__main__":
    sys.exit(main())
