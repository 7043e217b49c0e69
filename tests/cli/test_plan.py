"""maxlm plan: exit codes that gate a pull request, one line for a mistake, what is written."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from maxlm.cli.main import main
from maxlm.config import load_config
from maxlm.programs.compile import DoesNotFit
from maxlm.run import RunConfig

STARTS = """
import gc, linecache, sys
from maxlm.cli.main import main
sys.argv = ["maxlm", "plan", "llama3_8b"]
assert main() == 0 and gc.get_freeze_count() > 100_000
print([path for path in linecache.cache if "/maxlm/" in path], *sys.modules)
"""
HEAVY = {"matplotlib", "orbax", "tensorstore", "tokenizers", "sentencepiece", "pyarrow"}
HEAVY |= {"jax.experimental.pallas.tpu", "jax.experimental.pallas.triton"}
FITS = ["plan", "llama2_7b", "data.batch_size=128", "--on", "v5p-64"]


def test_starts_without_what_it_does_not_need():
    """No heavy module, no source read for docstrings, no search for garbage at the end."""
    code = [sys.executable, "-c", STARTS]
    sources, *modules = subprocess.check_output(code, text=True).splitlines()[-1].split()
    assert (sources, HEAVY & {*modules}) == ("[]", set())


def test_exit_codes(capsys):
    assert main(FITS) == 0
    assert "fits: " in capsys.readouterr().out
    assert main(["plan", "llama3_70b", "--on", "v5p-128"]) == 1
    out = capsys.readouterr().out
    assert "does not fit: " in out
    assert "train.micro_batches" in out.split("does not fit")[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["llama2_7b", "--on", "v9-8"], "no machine is called 'v9-8'"),
        (["llama2_7b", "--on", "v5p-64", "--mesh", "fsdp=7"], "needs 7 devices, 32 here"),
        (["llama2_7b", "--search"], "--search needs a machine"),
        (["llama2_7b", "--compile"], "--compile needs a machine"),
        (["llama2_7b", "--price", "2"], "--price needs a machine"),
        (["llama2_7b", "--on", "v5p-64", "--devices", "8"], "--devices goes without --on"),
        (
            ["llama2_7b", "--on", "v5p-64", "--search", "--mesh", "fsdp=32"],
            "--mesh is what --search",
        ),
        (["llama2_7b", "--on", "v5p-64", "--restart", "inf"], "--restart=inf is too much"),
        (["llama2_7b", "--on", "v5p-64", "--device-mtbf", "1e308"], "1e+308 is too much"),
        (["llama2_7b", "--compile-top", "2"], "--compile-top needs a machine"),
        (["llama2_7b", "--on", "v5p-64", "--top", "2"], "--top is how many a search shows"),
        (["diff", "nowhere.json", "nowhere.json"], "nowhere.json"),
        (["diff", "llama2_7b"], "missing argument 'second'"),
    ],
)
def test_a_mistake_is_one_line(arguments, words, capsys):
    assert main(["plan", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err
    assert len(printed.err.splitlines()) == 1


def test_no_compiler_here(capsys, monkeypatch):
    monkeypatch.setattr("maxlm.programs.compile.has_compiler", lambda platform: False)
    assert main([*FITS, "--compile"]) == 2
    assert "pip install" in capsys.readouterr().err


def test_on_this_machine_with_its_own_compiler(capsys):
    settings = ["data.batch_size=8", "model.num_layers=2", "optimizer.kind=adamw"]
    assert main(["plan", "demo", *settings, "--on", "cpux8", "--compile", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["machine"]["words"] == "8 CPU devices on one host"
    assert out["compiled"]["fits"]
    rest = out["compiled"]["figures"]["resting: state and batch, GB"]
    assert rest["plan"] == pytest.approx(rest["compiler"], rel=1e-3)
    sent = out["compiled"]["figures"]["sent, GB"]
    assert sent["plan"] == pytest.approx(sent["compiler"], rel=0.05)


def test_the_page_and_json(tmp_path, capsys):
    page = tmp_path / "report.html"
    assert main([*FITS, "--html", str(page), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["machine"]["name"] == "v5p-64"
    assert "llama2_7b" in page.read_text()
    assert main([*FITS, "--html", str(tmp_path / "nowhere" / "report.html")]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main([*FITS, "--html", "."]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_diff_of_files_folders_and_configs(tmp_path, capsys):
    for name, more in (("a", []), ("b", ["model.remat=mlp"])):
        assert main([*FITS, *more, "--json"]) == 0
        (tmp_path / name).mkdir()
        (tmp_path / name / "plan.json").write_text(capsys.readouterr().out)
    first, second = tmp_path / "a", tmp_path / "b" / "plan.json"
    assert main(["plan", "diff", str(first), str(second), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["facts"] == {"remat": ["full", "mlp"]}
    assert main(["plan", "diff", str(first), str(first)]) == 0
    assert capsys.readouterr().out == "no difference\n"
    assert main(["plan", "diff", "llama2_7b", "llama2_13b", "--on", "v5p-1024"]) == 0
    out = capsys.readouterr().out
    assert "6,738,415,616" in out
    assert "13,015,864,320" in out
    second.write_text('{"mesh": 1, "rows": 2, "memory": 3}')
    assert main(["plan", "diff", str(first), str(second)]) == 2
    assert "is no plan" in capsys.readouterr().err


def test_a_search_prints_what_train_takes(tmp_path, capsys):
    settings = ["data.batch_size=256", "train.steps=20000"]
    assert main(["plan", "llama3_8b", *settings, "--on", "v5p-64", "--search", "--top", "2"]) == 0
    out = capsys.readouterr().out
    text = out.split("for maxlm train\n")[1].split("\n\n")[0]
    file = tmp_path / "found.yaml"
    file.write_text(text)
    found = load_config(RunConfig, file).value
    assert (found.data.batch_size, found.train.steps) == (256, 20000)
    assert out.count("fits: ") == 1
    assert main(["plan", str(file), "--on", "v5p-64"]) == 0


def test_a_search_in_vain(capsys):
    assert main(["plan", "llama3_405b", "--on", "v5e-8", "--search"]) == 1
    assert "none fits; the least that any needs is" in capsys.readouterr().out
    assert main(["plan", "llama3_405b", "--on", "v5e-8", "--search", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["fits"], found["search"]["best"], found["search"]["fitting"]) == (False, [], 0)


def test_where_the_compiler_finds_no_room(capsys, monkeypatch):
    def no_room(run, machine):
        if run.train.micro_batches < 4:
            raise DoesNotFit("the compiler finds no room: 20G of 16G")
        return SimpleNamespace(memory=SimpleNamespace(peak=7e9))

    monkeypatch.setattr("maxlm.programs.plans.compile_step", no_room)
    settings = ["gpt2", "data.batch_size=64", "--on", "v5e-8"]
    assert main(["plan", *settings, "train.micro_batches=1", "--compile", "--json"]) == 1
    out = json.loads(capsys.readouterr().out)
    assert out["fits"]
    assert not out["compiled"]["fits"]
    assert "20G of 16G" in out["compiled"]["words"]
    # The first that fits by both accounts wins; where none compiled does, none is printed.
    search = ["plan", *settings, "--search", "--json"]
    assert main([*search, "--top", "40", "--compile-top", "40"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["micro_batches"] >= 4
    rooms = [(own["micro_batches"], own["compiled"]) for own in found["search"]["best"]]
    assert (1, None) in rooms
    assert all((compiled is None) == (micro < 4) for micro, compiled in rooms)
    assert main([*search, "--top", "10", "--compile-top", "1"]) == 1


def test_a_search_keeps_to_what_a_run_allows(capsys):
    """An expert's capacity is counted in whole sequences: no candidate may split them."""
    settings = ["model.moe.dispatch=capacity", "data.batch_size=16"]
    arguments = ["plan", "mixtral_8x7b", *settings, "--on", "v5p-256", "--search", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)["search"]
    assert found["best"]
    assert all(own["sizes"]["context"] == 1 for own in found["best"])


def test_a_search_in_which_nothing_divides(capsys):
    assert main(["plan", "llama3_405b", "--on", "v5p-8960", "--search"]) == 1
    assert "none divides" in capsys.readouterr().out


def test_json_stays_json_beside_a_search(capsys):
    assert main(["plan", "gpt2", "--on", "v5e-16", "--search", "--json"]) == 0
    printed = capsys.readouterr()
    plan = json.loads(printed.out)
    assert plan["fits"]
    first = plan["search"]["best"][0]
    assert first["seconds"] == pytest.approx(plan["time"]["step"])
    assert first["sizes"] == plan["mesh"]
    assert "candidates in" in printed.err
