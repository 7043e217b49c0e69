"""What is read back from TensorBoard's files, and what W&B is told."""

import struct
import sys
from types import SimpleNamespace

import pytest

from maxlm.config import MaxlmError
from maxlm.train import records as records_module
from maxlm.train.records import MetricsLog, ReportingConfig, WandbConfig, read_records
from tests.errors import message
from tests.train.test_metrics import files_at_most


def shown_on_board(folder):
    """What TensorBoard shows: {tag: {step: value}}. A session's start withdraws what came before it
    from its step on."""
    from tensorboardX.proto.event_pb2 import Event

    shown = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:  # length, its checksum, an event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            if event.session_log.status == 1:
                shown = {
                    tag: {s: v for s, v in curve.items() if s < event.step}
                    for tag, curve in shown.items()
                }
            for value in event.summary.value:
                shown.setdefault(value.tag, {})[event.step] = value.simple_value
    return shown


def test_tensorboard_shows_what_the_records_hold(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(1, 7):
            log.log(step, {"loss": 100.0 + step, "eval_bits_per_byte/text": 1 / step})
        log.rewind(4)
        log.log(5, {"loss": 5.0})
    with MetricsLog(tmp_path, resume_step=3) as log:
        log.log(4, {"loss": 4.0})
    shown = shown_on_board(tmp_path / "tensorboard")
    records = list(read_records(tmp_path / "metrics.jsonl"))
    for tag in ("loss", "eval_bits_per_byte/text"):
        assert shown[tag] == pytest.approx({r["step"]: r[tag] for r in records if tag in r})
    assert shown["loss"] == {1: 101.0, 2: 102.0, 3: 103.0, 4: 4.0}


def test_full_disk_is_an_error_of_tensorboard_not_a_wait(tmp_path):
    """tensorboardX's own writer would wait for its dead thread."""
    with MetricsLog(tmp_path) as log:
        log.log(1, {"loss": 1.0})
        for _ in range(20):
            log.rewind(1)
        (path,) = (tmp_path / "tensorboard").iterdir()
        size = path.stat().st_size
        assert size > 2 * (tmp_path / "metrics.jsonl").stat().st_size
        with (
            files_at_most(size + 10),
            pytest.raises(MaxlmError, match="tensorboard: cannot write"),
        ):
            log.log(2, {"loss": 1.0})


def test_wandb_gets_one_run_for_all_attempts_with_steps_as_its_axis(tmp_path, monkeypatch):
    started, told = [], []

    def init(**settings):
        if settings["project"] != "tiny":
            raise wandb.Error("no such project")
        started.append(settings)
        return SimpleNamespace(
            define_metric=lambda name, step_metric: told.append((name, step_metric)),
            log=told.append,
            finish=lambda: told.append("finished"),
        )

    wandb = SimpleNamespace(init=init, Settings=dict, Error=ValueError, __spec__=sys.__spec__)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(ReportingConfig, "check_packages", lambda self: None)
    (tmp_path / "config.yaml").write_text("seed: 17\n")
    config = ReportingConfig(tensorboard=False, wandb=WandbConfig(project="tiny", mode="offline"))
    for step in (1, 2):
        with MetricsLog(tmp_path, step - 1, reporting=config) as log:
            log.log(step, {"loss": 1 / step})
    assert told == [
        *[("*", "step"), {"step": 1, "loss": 1.0}, "finished"],
        *[("*", "step"), {"step": 2, "loss": 0.5}, "finished"],
    ]
    assert started[0] == started[1]
    kept = {name: started[0][name] for name in ("resume", "name", "mode", "config")}
    assert kept == {
        "resume": "allow",
        "name": tmp_path.name,
        "mode": "offline",
        "config": {"seed": 17},
    }
    refused = ReportingConfig(tensorboard=False, wandb=WandbConfig())
    with pytest.raises(MaxlmError, match=r"Weights & Biases: no such project; .*mode=offline"):
        MetricsLog(tmp_path, reporting=refused)


def test_missing_package_is_reported_before_anything_is_opened(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(records_module, "find_spec", lambda name: None)
        text = message(ReportingConfig(wandb=WandbConfig()).check_packages)
    assert text.startswith("reporting.wandb: the package wandb")
    assert "pip install 'maxlm[reporting]'" in text
    ReportingConfig(wandb=WandbConfig(mode="disabled")).check_packages()
    # A folder that wandb has made beside a script is no package.
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(MaxlmError, match="not installed"):
        ReportingConfig(wandb=WandbConfig()).check_packages()
