"""Promise: the command line starts fast, and a mistake is one line on stderr with exit
code 2."""

import errno
import subprocess
import sys
from importlib import metadata
from types import ModuleType

import pytest
import typer

from maxlm.cli import main as cli
from maxlm.config import MaxlmError

HEAVY = ("jax", "flax", "yaml", "numpy", "tokenizers")


@pytest.fixture
def verb(monkeypatch):
    """Puts a function or a group where ``maxlm train`` is looked for."""

    def put(function_or_group) -> None:
        module = ModuleType("maxlm.cli.train")
        is_group = isinstance(function_or_group, typer.Typer)
        setattr(module, "app" if is_group else "command", function_or_group)
        monkeypatch.setitem(sys.modules, "maxlm.cli.train", module)

    return put


def command(
    config: str,
    overrides: list[str] = typer.Argument(None),
    steps: int = typer.Option(1, "--steps", help="How many."),
) -> None:
    """Trains for a while."""
    print(config, overrides, steps)


def test_no_heavy_import_before_a_verb_is_called_and_the_process_exits_with_the_code():
    code = f"""
import sys
from maxlm.cli.main import main
codes = [main(arguments) for arguments in (["--help"], ["--version"], ["tran"])]
print(*codes, *[name for name in {HEAVY!r} if name in sys.modules])
print(*[name for name in sys.modules if name.startswith("maxlm.") and name != "maxlm.cli.main"])
sys.argv[1:] = ["trian"]
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    imported, ours = done.stdout.splitlines()[-2:]
    assert imported == "0 0 2"
    assert ours == "maxlm.cli"
    assert done.returncode == 2
    assert done.stderr.endswith(
        "error: maxlm: no such command 'trian'; did you mean 'train'?\n"
    )


def test_help_lists_every_verb_with_its_line_and_the_version_is_the_packages(run):
    code, out, err = run("-h")
    assert (code, err) == (0, "")
    assert all(name in out and line[:40] in out for name, line in cli.VERBS.items())
    assert run("--version") == (0, f"maxlm {metadata.version('maxlm')}\n", "")


def test_a_verb_or_a_group_is_called_with_its_arguments_and_has_help(run, verb):
    verb(command)
    out = "demo ['a.b=1', 'c=-2'] 3\n"
    assert run("train", "demo", "a.b=1", "c=-2", "--steps", "3") == (0, out, "")
    code, out, _ = run("train", "--help")
    assert code == 0
    for words in ("Trains for a while.", "maxlm train", "--steps"):
        assert words in out
    group = typer.Typer(no_args_is_help=True)
    group.command("only")(command)
    verb(group)
    assert run("train", "only", "demo") == (0, "demo None 1\n", "")
    code, out, err = run("train")
    assert (code, "only" in out + err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian"], "maxlm: no such command 'trian'; did you mean 'train'?"),
        (["--vresion"], "maxlm: no such option --vresion; did you mean --version?"),
        (
            ["train", "x", "--zzz"],
            "maxlm train: no such option --zzz; see 'maxlm train --help'",
        ),
        (["train"], "maxlm train: missing argument 'config'; see 'maxlm train --help'"),
        (
            ["config", "shwo"],
            "maxlm config: no such command 'shwo'; did you mean 'show'?",
        ),
    ],
)
def test_usage_errors(run, verb, arguments, line):
    verb(command)
    assert run(*arguments) == (2, "", f"error: {line}\n")
    code, _, err = run("train", "x", "--steps", "many")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: maxlm train: invalid value for '--steps': ")


@pytest.mark.parametrize(
    ("arguments", "override"),
    [
        (["train", "demo", "--steps", "5"], "train.steps=5"),
        (["train", "demo", "--batch-size=96"], "data.batch_size=96"),
        (["plan", "demo", "--train.steps", "--on", "cpux2"], "train.steps=..."),
        (["serve", "runs/x", "--max_sequences", "4"], "max_sequences=4"),
        (["chat", "runs/x", "--temperature=0.5"], "temperature=0.5"),
    ],
)
def test_an_option_that_is_a_setting(run, arguments, override):
    option = arguments[2].partition("=")[0]
    fault = f"no such option {option}; a setting takes no dashes: {override}"
    assert run(*arguments) == (2, "", f"error: maxlm {arguments[0]}: {fault}\n")


def failing(error: BaseException):
    def command() -> None:
        raise error

    return command


MISTAKE = MaxlmError("is\nwrong", where="run.yaml:3", fix="mend it")
ENDINGS = [
    (MISTAKE, 2, "error: run.yaml:3: is wrong; mend it\n"),
    (OSError(errno.ENOSPC, "No space", "/x"), 2, "error: /x: no space\n"),
    (KeyboardInterrupt(), 130, "\ninterrupted\n"),
    (KeyboardInterrupt("saved step 3 in runs/x"), 130, "\nsaved step 3 in runs/x\n"),
    (typer.Exit(1), 1, ""),
]


@pytest.mark.parametrize(("error", "code", "text"), ENDINGS)
def test_how_a_verb_ends_is_one_line_and_a_code(run, verb, error, code, text):
    verb(failing(error))
    assert run("train") == (code, "", text)


def test_a_bug_shows_itself_and_a_mistake_where_it_is_asked_for(verb, monkeypatch):
    for bug in (ValueError("a bug"), FileNotFoundError(errno.ENOENT, "no", "x")):
        verb(failing(bug))
        with pytest.raises(type(bug)):
            cli.main(["train"])
    verb(failing(MISTAKE))
    monkeypatch.setenv("MAXLM_TRACEBACK", "1")
    with pytest.raises(MaxlmError):
        cli.main(["train"])


@pytest.mark.parametrize(
    "arguments",
    [
        "corpus build a.txt --tokenizer t --out s3://b/x",
        "corpus build s3://b/x --tokenizer t --out o",
        "corpus run a.yaml",
        "corpus train-quality --positive a.txt --negative s3://b/x --out o",
        "convert a s3://b/x",
        "train demo folder=s3://b/x",
        "corpus mix demo data.sources.0.documents=[s3://b/x]",
    ],
)
def test_an_object_store_is_refused_and_no_folder_is_made(
    check_refused, tmp_path, monkeypatch, arguments
):
    """Only stores to read and copies of checkpoints may lie there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.yaml").write_text(
        "{out: 's3://b/x', sources: [{name: a, documents: [a.txt]}]}"
    )
    fix = "use a folder here, and copy it with aws s3 sync"
    check_refused(
        tmp_path, arguments.split(), f"...s3://b/x is not on a disk; ...; {fix}"
    )
