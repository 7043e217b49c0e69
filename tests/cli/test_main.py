"""Promise: the command line starts fast, and a mistake is one line on stderr with exit code 2."""

import errno
import os
import subprocess
import sys
from importlib import metadata
from types import ModuleType

import pytest
import typer

from maxlm import __version__
from maxlm.cli import main as cli
from maxlm.config import MaxlmError

HEAVY = ("jax", "flax", "pydantic", "yaml", "numpy", "tokenizers")


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs ``maxlm ARGUMENTS`` and gives (exit code, stdout, stderr)."""
    monkeypatch.delenv("MAXLM_TRACEBACK", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture
def verb(monkeypatch):
    """Puts a function or a group where ``maxlm train`` is looked for."""

    def put(found) -> None:
        module = ModuleType("a_verb")
        module.found = found  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setitem(sys.modules, "a_verb", module)
        monkeypatch.setitem(cli.VERBS, "train", cli.Verb("a_verb:found", "Train."))

    return put


def command(
    config: str,
    overrides: list[str] = typer.Argument(None),
    steps: int = typer.Option(1, "--steps", help="How many."),
) -> None:
    """Trains for a while."""
    print(config, overrides, steps)


@pytest.mark.parametrize("arguments", [["--help"], [], ["--version"], ["tran"]])
def test_no_heavy_import_before_a_verb_is_called(arguments):
    code = f"""
import sys
from maxlm.cli.main import main
main({arguments!r})
print(*[name for name in {HEAVY!r} if name in sys.modules])
print(*[name for name in sys.modules if name.startswith("maxlm.") and name != "maxlm.cli.main"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, ours = done.stdout.splitlines()[-2:]
    # Typer itself reads the values of options with pydantic; its help does without.
    assert heavy == "" if arguments == ["--help"] else heavy in ("", "pydantic")
    assert ours == "maxlm.cli"


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help_lists_every_verb_with_its_line(run, arguments):
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    for name, verb in cli.VERBS.items():
        assert name in out
        assert verb.help[:40] in out


def test_the_version_is_the_package_s(run):
    assert run("--version") == (0, f"maxlm {__version__}\n", "")
    assert __version__ == metadata.version("maxlm")


def test_a_verb_is_called_with_its_arguments(run, verb):
    verb(command)
    assert run("train", "demo", "a.b=1", "c=-2", "--steps", "3") == (
        0,
        "demo ['a.b=1', 'c=-2'] 3\n",
        "",
    )


def test_a_verbs_own_help(run, verb):
    verb(command)
    code, out, _ = run("train", "--help")
    assert code == 0
    assert "Trains for a while." in out
    assert "maxlm train" in out
    assert "--steps" in out


def test_a_group_of_one_command_stays_a_group(run, verb):
    group = typer.Typer(no_args_is_help=True)
    group.command("only")(command)
    verb(group)
    assert run("train", "only", "demo") == (0, "demo None 1\n", "")
    code, out, err = run("train")
    assert code == 2
    assert "only" in out + err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian"], "maxlm: no such command 'trian'; did you mean 'train'?"),
        (["zzz"], "maxlm: no such command 'zzz'; see 'maxlm --help'"),
        (["--vresion"], "maxlm: no such option --vresion; did you mean --version?"),
        (["train", "x", "--step", "3"], "maxlm train: no such option --step; "
         "did you mean --steps?"),
        (["train", "x", "--zzz"], "maxlm train: no such option --zzz; see 'maxlm train --help'"),
        (["train", "x", "--model.d=1"], "maxlm train: no such option --model.d; "
         "a setting takes no dashes: model.d=..."),
        (["train"], "maxlm train: missing argument 'config'; see 'maxlm train --help'"),
        (["config", "shwo"], "maxlm config: no such command 'shwo'; did you mean 'show'?"),
    ],
)  # fmt: skip
def test_usage_errors(run, verb, arguments, line):
    verb(command)
    assert run(*arguments) == (2, "", f"error: {line}\n")


@pytest.mark.parametrize(
    ("arguments", "override"),
    [
        (["train", "demo", "--steps", "5"], "train.steps=5"),
        (["train", "demo", "--batch-size=96"], "data.batch_size=96"),
        (["plan", "demo", "--train.steps", "--on", "cpux2"], "train.steps=..."),
        (["smoke", "demo", "--attention-num-heads", "3"], "model.attention.num_heads=3"),
    ],
)
def test_an_option_that_is_a_setting(run, arguments, override):
    option = arguments[2].partition("=")[0]
    fault = f"no such option {option}; a setting takes no dashes: {override}"
    assert run(*arguments) == (2, "", f"error: maxlm {arguments[0]}: {fault}\n")


def test_a_value_of_the_wrong_type(run, verb):
    verb(command)
    code, out, err = run("train", "x", "--steps", "many")
    assert (code, out) == (2, "")
    assert err.startswith("error: maxlm train: invalid value for '--steps': ")
    assert err.endswith("; see 'maxlm train --help'\n")
    assert err.count("\n") == 1


def failing(error: BaseException):
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            MaxlmError("is\nwrong", where="run.yaml:3", fix="mend it"),
            "run.yaml:3: is wrong; mend it",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: permission denied"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "/x: no space left on device"),
    ],
)
def test_a_mistake_is_one_line(run, verb, monkeypatch, error, line):
    verb(failing(error))
    assert run("train") == (2, "", f"error: {line}\n")
    monkeypatch.setenv("MAXLM_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli.main(["train"])


@pytest.mark.parametrize("error", [ValueError("a bug"), FileNotFoundError(errno.ENOENT, "no", "x")])
def test_a_bug_shows_itself(verb, error):
    verb(failing(error))
    with pytest.raises(type(error)):
        cli.main(["train"])


@pytest.mark.parametrize(
    ("interrupt", "text"),
    [
        (KeyboardInterrupt(), "\ninterrupted\n"),
        (KeyboardInterrupt("saved step 3 in runs/x"), "\nsaved step 3 in runs/x\n"),
    ],
)
def test_an_interrupt(run, verb, interrupt, text):
    verb(failing(interrupt))
    assert run("train") == (130, "", text)


def test_a_verb_chooses_its_exit_code(run, verb):
    verb(failing(typer.Exit(1)))
    assert run("train") == (1, "", "")


def test_the_process_exits_with_the_code():
    done = subprocess.run(
        [sys.executable, "-m", "maxlm.cli.main", "trian"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: maxlm: no such command 'trian'; did you mean 'train'?\n"


COMPLAINTS = '''
import asyncio, sys
from maxlm.cli import main

SOURCE = """
class Forever:
    def __await__(self):
        yield

async def read():
    try:
        await Forever()
    except BaseException:
        raise ValueError("closed in " + file)

async def fail():
    raise ValueError("failed in " + file)

async def never():
    asyncio.ensure_future(fail())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
"""

sys.argv = ["maxlm", "--version"]
main.main()


class Faulty:
    def __del__(self):
        raise ValueError("a fault of ours")


async def async_serialize():
    pass


async def begin():
    pass


Faulty()
for file in ("orbax/reading.py", "ours.py"):
    exec(compile(SOURCE, file, "exec"), scope := {"asyncio": asyncio, "file": file})
    reading = scope["read"]()
    reading.send(None)
    asyncio.run(scope["never"]())
    del reading, scope
async_serialize(), begin()
'''


@pytest.mark.parametrize("traceback", ["0", "1"])
def test_what_a_failed_checkpoint_drops_is_not_told_and_all_else_is(traceback):
    done = subprocess.run(
        [sys.executable, "-c", COMPLAINTS],
        env={**os.environ, "MAXLM_TRACEBACK": traceback},
        capture_output=True,
        text=True,
        check=True,
    )
    complaints = ["closed in orbax", "failed in orbax", "'async_serialize' was never awaited"]
    for complaint in complaints:
        assert (complaint in done.stderr) == (traceback == "1"), done.stderr
    ours = [
        "a fault of ours",
        "closed in ours.py",
        "failed in ours.py",
        "'begin' was never awaited",
    ]
    assert [complaint for complaint in ours if complaint not in done.stderr] == []


@pytest.mark.parametrize(
    "arguments",
    [
        "corpus build a.txt --tokenizer t --out s3://b/x",
        "corpus build s3://b/x --tokenizer t --out o",
        "corpus append s3://b/x a.txt",
        "corpus run a.yaml",
        "corpus report c --out s3://b/x",
        "tokenizer train a.txt --out s3://b/x",
        "corpus train-quality --positive a.txt --negative s3://b/x --out o",
        "convert a s3://b/x",
        "train demo folder=s3://b/x",
        "train demo compilation_cache=s3://b/x",
        "corpus mix demo data.sources.0.documents=[s3://b/x]",
    ],
)
def test_an_object_store_is_refused_and_no_folder_is_made(run, tmp_path, monkeypatch, arguments):
    """Only stores to read and copies of checkpoints may lie there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.yaml").write_text("{out: 's3://b/x', sources: [{name: a, documents: [a.txt]}]}")
    code, _, errors = run(*arguments.split())
    assert (code, errors.count("\n")) == (2, 1)
    assert "s3://b/x is not on a disk; " in errors
    assert errors.endswith("; use a folder here, and copy it with aws s3 sync\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "a.yaml"]
