"""Settings of objectives that cannot be done are refused by name, before anything runs."""

import pytest

from maxlm.config import MaxlmError, find_asset, load_config
from maxlm.run import RunConfig
from maxlm.tasks import SpanCorruptionConfig, Ul2Config

T5, BERT, UL2 = (f"configs/models/{name}.yaml" for name in ("t5_small", "bert_base", "ul2_20b"))


@pytest.mark.parametrize(
    ("preset", "overrides", "where", "what"),
    [
        (T5, ["objective.first_sentinel=32128"], "objective.first_sentinel", "32128 is no row"),
        (T5, ["objective.first_sentinel=98"], "objective", "no 100 ids at and below"),
        (BERT, ["objective.mask_id=30522"], "objective.mask_id", "30522 is no row"),
        (UL2, ["objective.regular_id=32128"], "objective.regular_id", "32128 is no row"),
        (UL2, ["objective.extreme_id=40000"], "objective.extreme_id", "40000 is no row"),
        (T5, ["objective.sentinels=27"], "objective.sentinels", "28 spans"),
        (UL2, ["objective.sentinels=83"], "objective.sentinels", "84 spans"),
        (T5, ["objective.encoder_len=511"], "objective.encoder_len", "too short"),
        (T5, ["objective.decoder_len=113"], "objective.decoder_len", "too short"),
        (BERT, ["samples.prompts=[the]"], "samples.prompts", "continues no text"),
    ],
)
def test_what_cannot_be_done_is_refused(preset, overrides, where, what):
    with pytest.raises(MaxlmError, match=what) as caught:
        load_config(RunConfig, find_asset(preset), overrides)
    assert where in str(caught.value)


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        (T5, ["objective.first_sentinel=32127", "objective.sentinels=28"]),
        (T5, ["objective.first_sentinel=99"]),
        (T5, ["objective.encoder_len=512", "objective.decoder_len=114"]),
        (BERT, ["objective.mask_id=30521"]),
        (UL2, ["objective.sentinels=84", "objective.sequential_id=32127"]),
    ],
)
def test_what_just_can_be_done_is_taken(preset, overrides):
    load_config(RunConfig, find_asset(preset), overrides)


def test_so_many_sentinels_are_enough():
    """28 and 84 above are the most spans of 568 and 504 tokens: 85 taken out in threes; 252."""
    assert SpanCorruptionConfig().lengths(568) == (512, 120)
    assert Ul2Config(sentinels=84).lengths(504)[1] >= 252 + 84 + 1
