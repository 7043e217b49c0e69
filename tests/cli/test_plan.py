"""maxlm plan: exit codes that gate a pull request, one line for a mistake, what is
written."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from maxlm.config.load import load_config
from maxlm.plan.compiled.program import DoesNotFit
from maxlm.run.config import RunConfig

STARTS = """
import gc, linecache, sys
from maxlm.cli.main import main
sys.argv = ["maxlm", "plan", "llama3_8b"]
assert main() == 0 and gc.get_freeze_count() > 100_000
print([path for path in linecache.cache if "/maxlm/" in path], *sys.modules)
"""
HEAVY = {
    "grain",
    "matplotlib",
    "orbax",
    "tensorstore",
    "tokenizers",
    "sentencepiece",
    "pyarrow",
}
HEAVY |= {"jax.experimental.pallas.tpu", "jax.experimental.pallas.triton"}
FITS = ["plan", "llama2_7b", "data.batch_size=128", "--on", "v5p-64"]


@pytest.mark.heavy
def test_starts_without_what_it_does_not_need():
    """No heavy module, no source read for docstrings, no search for garbage at the
    end."""
    code = [sys.executable, "-c", STARTS]
    sources, *modules = (
        subprocess.check_output(code, text=True).splitlines()[-1].split()
    )
    assert (sources, HEAVY & {*modules}) == ("[]", set())


def test_exit_codes(run):
    code, out, _ = run(*FITS)
    assert (code, "fits: " in out) == (0, True)
    code, out, _ = run("plan", "llama3_70b", "--on", "v5p-128")
    assert code == 1
    assert "train.micro_batches" in out.split("does not fit: ")[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["llama2_7b", "--on", "v9-8"], "no machine is called 'v9-8'"),
        (
            ["llama2_7b", "--on", "v5p-64", "--mesh", "fsdp=7"],
            "needs 7 devices, 32 here",
        ),
        (["llama2_7b", "--price", "2"], "--price needs a machine"),
        (["llama2_7b", "--compile-top", "2"], "--compile-top needs a machine"),
        (
            ["llama2_7b", "--restart", "2"],
            "--device-mtbf, --restart or --checkpoint needs a",
        ),
        ([*FITS[1:], "--devices", "8"], "--devices excludes --on"),
        (["diff", "nowhere.json", "nowhere.json"], "nowhere.json"),
        (["diff", "llama2_7b"], "missing argument 'second'"),
        (
            ["diff", "llama2_7b", "llama2_7b model.remaat=mlp"],
            "unknown key model.remaat",
        ),
        ([*FITS[1:], "--search", "--mesh", "fsdp=32"], "--mesh is what --search"),
        ([*FITS[1:], "--top", "2"], "--top needs a search"),
        (["llama3_8b", "--serve"], "--serve needs a machine"),
        (
            ["llama3_8b", "--serve", "--on", "v5p-8", "--cache", "int3"],
            "'auto', 'int8', 'int4'",
        ),
        (
            ["llama3_8b", "--serve", "--on", "v5p-8", "--compile"],
            "--compile is for training runs",
        ),
        (
            ["llama3_8b", "--serve", "--on", "v5p-8", "--devices", "8"],
            "--devices is for training runs",
        ),
        (
            ["llama3_8b", "--serve", "--on", "v5p-8", "--mesh", "stage=4"],
            "stage does not split",
        ),
        (
            ["llama3_8b", "--serve", "--on", "v5p-8", "--weights", "fp9"],
            "--scheme: no scheme 'fp9'; use one such as fp8",
        ),
        ([*FITS[1:], "--tpot-ms", "3"], "--tpot-ms is for serving"),
        (
            [*FITS[1:], "--new", "3"],
            "--new is for serving, and task.kind=clm generates",
        ),
        (["llama3_8b", "--prompt", "3"], "--prompt or --new needs a machine"),
    ],
)
def test_a_mistake_is_one_line(arguments, words, check_refused, tmp_path):
    check_refused(tmp_path, ["plan", *arguments], f"...{words}...")


def test_no_compiler_here(run, monkeypatch):
    monkeypatch.setattr(
        "maxlm.plan.compiled.program.has_compiler", lambda platform: False
    )
    code, _, err = run(*FITS, "--compile")
    assert (code, "pip install" in err) == (2, True)


@pytest.mark.more
def test_on_this_machine_with_its_own_compiler(run):
    settings = ["data.batch_size=8", "model.num_layers=2", "optimizer.kind=adamw"]
    out = json.loads(
        run("plan", "demo", *settings, "--on", "cpux8", "--compile", "--json").out
    )
    assert out["machine"]["words"] == "8 CPU devices on one host"
    assert out["compiled"]["fits"]
    assert out["compiled"]["seconds"] > 0
    figures = out["compiled"]["figures"]
    rest = figures["arguments: state and batch"]
    assert rest["plan"] == pytest.approx(rest["compiler"], rel=1e-3)
    # What is trained takes the place of what was.
    outputs, reused = figures["outputs"], figures["outputs in arguments' place"]
    assert outputs["compiler"] == pytest.approx(reused["compiler"], rel=1e-3)
    temporaries, peak = figures["temporaries"]["compiler"], figures["peak"]["compiler"]
    assert peak == pytest.approx(rest["compiler"] + temporaries, rel=1e-3)
    # Products of all layers, in every trip of the loop over them.
    (products,) = out["compiled"]["products"].values()
    assert products["plan"] == pytest.approx(products["compiler"], rel=1e-3)
    sent = out["compiled"]["collectives"]
    planned = sum(row["planned_bytes"] for row in sent)
    assert planned == pytest.approx(
        sum(row["compiled_bytes"] for row in sent), rel=0.05
    )
    gathers = next(row for row in sent if row["kind"] == "all-gather")
    assert (gathers["axes"], gathers["compiled_runs"] >= 2) == ("fsdp", True)
    assert planned == pytest.approx(sum(c["sent_bytes"] for c in out["collectives"]))


def test_the_page_and_json(run, tmp_path):
    page = tmp_path / "report.html"
    plan = json.loads(run(*FITS, "--html", page, "--json").out)
    assert plan["machine"]["name"] == "v5p-64"
    assert "llama2_7b" in page.read_text()
    code, _, err = run(*FITS, "--html", tmp_path / "nowhere" / "report.html")
    assert (code, "nowhere" in err) == (2, True)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_options_of_goodput_and_of_devices(run):
    """As often as devices fail: Daly's best interval is √(2·δ·M) to first order."""
    plan = json.loads(run(*FITS, "--json").out)
    options = ["--device-mtbf", "1000", "--restart", "60", "--checkpoint", "5"]
    goodput = json.loads(run(*FITS, *options, "--json").out)["goodput"]
    assert goodput["mtbf_hours"] == pytest.approx(1000 / 32)
    assert (goodput["restart_seconds"], goodput["checkpoint_seconds"]) == (60, 5)
    first_order = (2 * 5 * 3600 * 1000 / 32) ** 0.5
    assert goodput["best_interval_seconds"] == pytest.approx(first_order, rel=0.02)
    assert goodput["best"] < plan["goodput"]["best"]
    plan = json.loads(run("plan", "llama2_7b", "--devices", "64", "--json").out)
    assert (plan["devices"], plan["mesh"]["fsdp"], plan["machine"]) == (64, 64, None)


def test_diff_of_files_folders_and_configs(run, tmp_path):
    for name, settings in (("a", []), ("b", ["model.remat=mlp"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "plan.json").write_text(run(*FITS, *settings, "--json").out)
    first, second = tmp_path / "a", tmp_path / "b" / "plan.json"
    diff = json.loads(run("plan", "diff", first, second, "--json").out)
    assert diff["facts"] == {"remat": ["full", "mlp"]}
    assert diff["mesh"] == diff["parameters"] == diff["communication"] == {}
    assert diff["memory"]["activations"][1] > diff["memory"]["activations"][0]
    assert set(diff["time"]) >= {"products", "step", "mfu"}
    assert run("plan", "diff", first, first) == (0, "no difference\n", "")
    configs = [
        "llama2_7b data.batch_size=128",
        "llama2_7b data.batch_size=128 mesh.tensor=4",
    ]
    out = run("plan", "diff", *configs, "--on", "v5p-64").out
    tensor = next(
        line.split() for line in out.splitlines() if line.startswith("tensor")
    )
    assert tensor == ["tensor", "1", "4", "+300.0%"]
    assert "all-reduce over tensor" in " ".join(out.split())
    for text in ('{"mesh": 1, "rows": 2, "memory": 3}', "{", "[]"):
        second.write_text(text)
        code, _, err = run("plan", "diff", first, second)
        assert (code, "plan.json: is no plan of a run" in err) == (2, True)


def test_a_search_prints_what_train_takes(run, tmp_path):
    settings = ["data.batch_size=256", "train.steps=20000", "--on", "v5p-64"]
    out = run("plan", "llama3_8b", *settings, "--search", "--top", "2").out
    file = tmp_path / "found.yaml"
    file.write_text(out.split("for maxlm train\n")[1].split("\n\n")[0])
    loaded = load_config(RunConfig, file).value
    assert (loaded.data.batch_size, loaded.train.steps) == (256, 20000)
    assert out.count("fits: ") == 1
    assert run("plan", file, "--on", "v5p-64").code == 0


def test_known_errors_stand_below_the_speeds_and_below_a_search(run):
    mixture = ["plan", "mixtral_8x7b", "--on", "v5p-256"]
    line = "speeds known to be wrong (compared with 116 published runs): mixtures of experts 34–98%"
    words = " ".join(run(*mixture).out.split())
    assert words.count(line) == 1
    words = " ".join(run(*mixture, "--search", "--top", "2").out.split())
    assert words.count(f"among these, {line}") == 1
    assert "known to be wrong" not in run(*FITS).out


@pytest.mark.heavy
def test_a_search_in_vain(run):
    search = ["plan", "llama3_405b", "--on", "v5e-8", "--search"]
    code, out, _ = run(*search)
    assert (code, "none fits; the least that any needs is" in out) == (1, True)
    code, out, _ = run(*search, "--json")
    result = json.loads(out)
    assert (code, result["fits"], result["search"]["best"]) == (1, False, [])
    code, out, _ = run("plan", "llama3_405b", "--on", "v5p-8960", "--search")
    assert (code, "none divides" in out) == (1, True)


@pytest.mark.heavy
def test_where_the_compiler_finds_no_room(run, monkeypatch):
    def no_room(run, machine):
        if run.train.micro_batches < 4:
            raise DoesNotFit("the compiler finds no room: 20G of 16G")
        return SimpleNamespace(peak_bytes=7e9)

    monkeypatch.setattr("maxlm.plan.compiled.program.compile_step", no_room)
    settings = ["plan", "gpt2", "data.batch_size=64", "--on", "v5e-8", "--json"]
    code, out, _ = run(*settings, "train.micro_batches=1", "--compile")
    assert code == 1
    compiled = json.loads(out)["compiled"]
    assert (compiled["fits"], "20G of 16G" in compiled["words"]) == (False, True)
    # The first that fits by both accounts wins; where none compiled does, none is
    # printed.
    code, out, _ = run(*settings, "--compile-top", "40")
    plan = json.loads(out)
    best = plan["search"]["best"]
    assert (code, len(best), plan["micro_batches"] >= 4) == (0, 40, True)
    assert any(candidate["micro_batches"] < 4 for candidate in best)
    for candidate in best:
        fits = candidate["micro_batches"] >= 4
        assert candidate["compiled"] == {"fits": fits, "peak": 7e9 if fits else None}
    first = next(candidate for candidate in best if candidate["compiled"]["fits"])
    assert first["sizes"] == plan["mesh"]
    code, out, _ = run(*settings, "--search", "--compile-top", "1")
    assert (code, json.loads(out)["fits"]) == (1, False)


def test_a_search_keeps_to_what_a_run_allows_and_json_stays_json(run):
    """An expert's capacity is counted in whole sequences: no candidate may split
    them."""
    settings = ["model.moe.dispatch=capacity", "data.batch_size=16"]
    code, out, err = run(
        "plan", "mixtral_8x7b", *settings, "--on", "v5p-256", "--search", "--json"
    )
    plan = json.loads(out)
    best = plan["search"]["best"]
    assert (code, plan["fits"], "candidates in" in err) == (0, True, True)
    assert best[0]["seconds"] == pytest.approx(plan["time"]["step"])
    assert best[0]["sizes"] == plan["mesh"]
    assert all(candidate["sizes"]["context"] == 1 for candidate in best)


def test_serving(run, tmp_path):
    """A run's folder, its best split, and the exit codes."""
    arguments = ["plan", "models/llama3_1_8b", "--serve", "--on", "h100x8"]
    code, out, _ = run(
        *arguments, "--tpot-ms", "30", "--search", "--top", "2", "--price", "2"
    )
    assert (code, "12 fit" in out, "for a million" in out) == (0, True, True)
    assert run(*arguments, "--tpot-ms", "1").code == 1
    code, out, _ = run("plan", "llama3_70b", "--serve", "--on", "h100x1")
    assert (code, "not one sequence" in out.split("does not fit: ")[1]) == (1, True)
    (tmp_path / "config.yaml").write_text("include: models/llama3_1_8b\nname: mine")
    sizes = ["--mesh", "data=4,tensor=2", "--batch", "64", "--cache", "int8"]
    page = ["--html", str(tmp_path / "page.html"), "--json"]
    plan = json.loads(run("plan", str(tmp_path), *arguments[2:], *sizes, *page).out)
    assert (plan["name"], plan["point"]["batch"], plan["mesh"]["tensor"]) == (
        "mine",
        64,
        2,
    )
    assert '"name": "mine"' in (tmp_path / "page.html").read_text()
