"""Settings of tasks that cannot be done are refused by name, before anything runs."""

from types import SimpleNamespace
from typing import Literal

import pytest

from maxlm.config import MaxlmError
from maxlm.config.assets import find_asset
from maxlm.config.load import load_config
from maxlm.run.config import RunConfig
from maxlm.tasks import ClmTask

T5 = "configs/models/t5_small.yaml"
BERT = "configs/models/bert_base.yaml"
UL2 = "configs/models/ul2_20b.yaml"


@pytest.mark.parametrize(
    ("preset", "overrides", "where", "message"),
    [
        (T5, ["task.first_sentinel=32128"], "task.first_sentinel", "32128 is no row"),
        (T5, ["task.first_sentinel=98"], "task", "no 100 ids at and below"),
        (BERT, ["task.mask_id=30522"], "task.mask_id", "30522 is no row"),
        (UL2, ["task.regular_id=32128"], "task.regular_id", "32128 is no row"),
        (UL2, ["task.extreme_id=40000"], "task.extreme_id", "40000 is no row"),
        (T5, ["task.sentinels=27"], "task.sentinels", "28 spans"),
        (UL2, ["task.sentinels=83"], "task.sentinels", "84 spans"),
        (T5, ["task.encoder_len=511"], "task.encoder_len", "too short"),
        (T5, ["task.decoder_len=113"], "task.decoder_len", "too short"),
        (BERT, ["samples.prompts=[the]"], "samples.prompts", "continues no text"),
    ],
)
def test_what_cannot_be_done_is_refused(preset, overrides, where, message):
    with pytest.raises(MaxlmError, match=message) as caught:
        load_config(RunConfig, find_asset(preset), overrides)
    assert where in str(caught.value)


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        (T5, ["task.first_sentinel=32127", "task.sentinels=28"]),
        (T5, ["task.first_sentinel=99"]),
        (T5, ["task.encoder_len=512", "task.decoder_len=114"]),
        (BERT, ["task.mask_id=30521"]),
        (UL2, ["task.sentinels=84", "task.sequential_id=32127"]),
    ],
)
def test_what_just_can_be_done_is_taken(preset, overrides):
    load_config(RunConfig, find_asset(preset), overrides)


class OtherTask(ClmTask):
    """As an installed package has it."""

    kind: Literal["other"] = "other"
    beta: float = 0.5


def test_a_task_of_an_installed_package_is_found_by_its_kind(monkeypatch):
    # Of its own: the registries load what is built in by entry points too.
    entry = SimpleNamespace(name="other", group="maxlm.tasks", load=lambda: OtherTask)
    monkeypatch.setattr(
        "maxlm.config.registry.entry_points",
        lambda group, name=None: (
            [entry] if group == entry.group and name in (None, entry.name) else []
        ),
    )
    config = load_config(RunConfig, "demo", ["task.kind=other", "task.beta=2"]).value
    assert config.task == OtherTask(beta=2.0)
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config
    with pytest.raises(MaxlmError, match=r"unknown key task\.betta"):
        load_config(RunConfig, "demo", ["task.kind=other", "task.betta=2"])
    with pytest.raises(
        MaxlmError, match=r"task\.kind must be one of .*, not 'unknown'"
    ):
        load_config(RunConfig, "demo", ["task.kind=unknown"])
