"""What a run measures on held-out text, while it trains and at its end."""

import pytest

from maxlm.tasks import ClmTask
from maxlm.train.display import plot_metrics
from tests.train import tiny

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose model stays as it is, so that only the rows can make a difference."""
    folder = tmp_path_factory.mktemp("heldout")
    config = tiny.write_config(
        folder,
        tiny.write_text(folder / "text", documents=40),
        schedule={"kind": "constant", "warmup_steps": 0, "learning_rate": 1e-30},
        train={"steps": 3, "eval_every": 1, "eval_batches": 1},
        checkpoint={"every_steps": 0},
        reporting={"tensorboard": False},
    )
    result, _ = tiny.train(config)
    return result


@pytest.mark.more
def test_every_point_of_a_curve_is_of_the_same_rows(run):
    records = [
        record for record in tiny.read_metrics(run.folder) if "eval_loss" in record
    ]
    assert [record["step"] for record in records] == [1, 2, 3]
    for name in ("eval_loss", "eval_bits_per_byte/text"):
        assert len({record[name] for record in records}) == 1, name


def test_the_end_measures_all_held_out_text_beside_the_curve(run):
    store, whole = run.data.heldout_stores["text"], run.heldout["text"]
    assert whole["tokens"] == store.num_tokens - store.num_documents
    assert whole["bytes"] == pytest.approx(store.manifest.text_bytes)
    last = tiny.read_metrics(run.folder)[-1]
    assert last["final_eval_loss"] == whole["loss"] != last["eval_loss"]
    assert last["final_eval_bits_per_byte/text"] == whole["bits_per_byte"]


def test_the_plot_marks_it_apart_from_the_curve(run, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = {}
    plot = Axes.plot

    def record_line(self, x, y, *, label=None, **style: object):
        drawn[label] = [float(value) for value in y]
        return plot(self, x, y, label=label, **style)

    monkeypatch.setattr(Axes, "plot", record_line)
    plot_metrics(
        run.folder / "metrics.jsonl", tmp_path / "loss.png", ClmTask.plotted_metrics
    )
    last = tiny.read_metrics(run.folder)[-1]
    assert drawn["held out"] == [last["eval_loss"]] * 3
    final = last["final_eval_loss"]
    assert drawn[f"all held-out text: {final:.3f}"] == [final]
