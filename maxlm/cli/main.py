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
from typing import Any

import typer
from typer import Option
from typer.core import TyperGroup
from typer.main import get_command, get_group

# Verb → its line of help.
VERBS = {
    "train": "Train a model, or go on where a run stopped.",
    "tune": "Tune a pretrained model: to answer, to prefer, to score, to imitate.",
    "smoke": "Check on this device, in a minute, that a config works.",
    "plan": "Show what a run holds, sends and takes on a machine, before paying for "
    "it.",
    "runs": "List runs; show how far one is and where its time went.",
    "launch": "Print or submit a cluster scheduler's job.",
    "generate": "Continue a prompt with a trained model.",
    "chat": "Talk with a model in the terminal.",
    "serve": "Serve a model over HTTP, by OpenAI's protocol, with a chat page.",
    "eval": "Evaluate a model on tasks of lm-evaluation-harness.",
    "convert": "Turn a Hugging Face checkpoint into a run, or a run into one.",
    "tokenizer": "Train, import and try tokenizers.",
    "corpus": "Clean and label documents, and turn them into token stores.",
    "config": "Show configs, where each value comes from, their schema.",
}


class LazyGroup(TyperGroup):
    """Lists verbs by their one line of help; imports a verb's module when it is
    called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name not in VERBS:
            return name, command, rest
        module: Any = importlib.import_module(f"maxlm.cli.{name}")
        found = module.app if hasattr(module, "app") else module.command
        if rest and (special := getattr(module, "subcommands", {}).get(rest[0])):
            name = f"{name} {rest[0]}"
            found = special
            rest = rest[1:]
        return name, _build_command(name, found), rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            print(
                f"\n{interrupt}" if str(interrupt) else "\ninterrupted", file=sys.stderr
            )
            raise typer.Exit(130) from None


def make_app() -> typer.Typer:
    """Build the application; its verbs are not imported yet."""
    app = typer.Typer(
        name="maxlm",
        cls=LazyGroup,
        help="Train, inspect and serve language models from one JAX codebase.",
        epilog="maxlm VERB --help says more. Settings are written key.path=value after "
        "a config.",
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
    traceback = os.environ.get("MAXLM_TRACEBACK", "") not in ("", "0")
    if arguments is None:  # the process is ours alone
        # Imports make 150,000 objects that stay. Looking through them after every 700
        # new ones, the default of Python 3.11, takes a seventh of the time to start.
        gc.set_threshold(10_000, *gc.get_threshold()[1:])
        os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' own progress bars
        if not traceback:
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
        given = sys.argv[1:] if arguments is None else arguments
        text = None if traceback else _explain(error, given)
        if text is None:
            raise
        print(text, file=sys.stderr)
        return getattr(error, "exit_code", 2)
    finally:
        if arguments is None:
            # The interpreter ends by searching for cycles: a third of a second.
            gc.freeze()
    return result if isinstance(result, int) else 0


def _build_command(name: str, found: Any) -> Any:
    group = isinstance(found, typer.Typer)
    app = (
        found
        if group
        else typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    )
    if not group:
        app.command(name)(found)
    for verb in app.registered_commands:
        if verb.callback and not hasattr(verb.callback, "__wrapped__"):
            verb.callback = _with_local_paths(verb.callback)
    command = get_group(app) if group else get_command(app)
    command.name = name
    return command


def _with_local_paths(command: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse URLs among the paths that a command is given."""

    @wraps(command)
    def checked(**given: Any) -> Any:
        from maxlm.config import check_local_path

        # The text that `tokenizer encode` takes is no list of paths.
        lists = [given.get(name) for name in ("text", "positive", "negative")]
        paths = [each for value in lists if isinstance(value, list) for each in value]
        for path in (
            *paths,
            *(value for value in given.values() if isinstance(value, Path)),
        ):
            check_local_path(path)
        return command(**given)

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
    context, option = getattr(error, "ctx", None), getattr(error, "option_name", None)
    path = context.command_path if context else "maxlm"
    text = error.format_message().rstrip(".")
    fix = f"see '{path} --help'"
    if context is None or option is None or not text.startswith("No such option"):
        text = f"{text[:1].lower()}{text[1:]}".replace(
            ". Did you mean", "; did you mean"
        )
        return f"{path}: {text}" + ("" if "did you mean" in text else f"; {fix}")
    if error.possibilities:
        fix = f"did you mean {' or '.join(error.possibilities)}?"
    if any(each.name == "settings" for each in context.command.params) and (
        overrides := _find_overrides(option, arguments, context.command.name)
    ):
        fix = f"a setting takes no dashes: {' or '.join(overrides[:3])}"
    return f"{path}: no such option {option}; {fix}"


def _find_overrides(option: str, arguments: Sequence[str], verb: str) -> list[str]:
    """Find settings of a verb, as ``key.path=value``, whose key is or ends like the
    option: ``--steps 5``."""
    from maxlm.config.explain import iterate_schema_keys
    from maxlm.config.keys import join_key

    schemas = {
        "serve": ("inference.engine_config", "Engine"),
        "chat": ("config.sampling", "Sampling"),
    }
    module, name = schemas.get(verb, ("run.config", "Run"))
    schema = getattr(importlib.import_module(f"maxlm.{module}"), f"{name}Config")
    words = [
        word for each in arguments for word in each.split("=", each.startswith("-"))
    ]
    value = dict(zip(words, [*words[1:], ""], strict=True)).get(option, "")
    value = "..." if not value or value.startswith("-") else value
    name = option.strip("-").replace("-", "_").replace(".", "_")
    keys = sorted(dict.fromkeys(iterate_schema_keys([schema])), key=len)
    ends = [
        key
        for key in keys
        if name in ("_".join(map(str, key[i:])) for i in range(len(key)))
    ]
    return [f"{join_key(key)}={value}" for key in ends]


if __name__ == "__main__":
    sys.exit(main())
