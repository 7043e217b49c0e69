"""One key extends a run's context: the effective run is the same wherever its settings
are read."""

import pytest
import yaml

from maxlm.config import MaxlmError
from maxlm.config.load import load_config
from maxlm.config.show import to_yaml
from maxlm.models.architectures.transformer import DecoderConfig
from maxlm.models.context_extension import ContextExtensionConfig, extend_context
from maxlm.run.config import RunConfig
from maxlm.train.smoke import shrink_config
from tests.train import tiny

SCALINGS = {
    "linear": {"kind": "linear", "factor": 4.0},
    "ntk": {"kind": "ntk", "factor": 4.0},
    "yarn": {"kind": "yarn", "factor": 4.0, "original_length": 32},
}


def make_model(**changes) -> DecoderConfig:
    """A model of 32 tokens."""
    return DecoderConfig.model_validate(
        tiny.settings("runs", "text")["model"] | changes
    )


def make_run(tune=None, seq_len=None, **model) -> RunConfig:
    """The tiny run of that model, in rows of ``seq_len`` tokens if that is given."""
    settings = tiny.settings("runs", "text")
    settings["model"] |= model
    settings["data"] |= {"seq_len": seq_len}
    if seq_len is None:
        del settings["data"]["seq_len"]
    return RunConfig.model_validate(settings | {"tune": tune or {}})


@pytest.mark.parametrize("kind", SCALINGS)
def test_the_effective_run_is_written_and_read_back(kind, tmp_path):
    run = make_run({"extend_to": 128, "extend_by": kind})
    scaling = run.model.positions.scaling.model_dump(exclude_defaults=True)
    assert scaling | {"kind": kind} == SCALINGS[kind]
    assert (run.model.max_seq_len, run.data.seq_len) == (128, 128)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(run))
    assert load_config(RunConfig, path).value == run
    assert shrink_config(run, 1).model.positions == run.model.positions


def test_rows_have_the_length_that_is_set_and_origins_tell_what_another_setting_changed(
    tmp_path,
):
    assert make_run({"extend_to": 128}, seq_len=64).data.seq_len == 64
    settings = tiny.settings("runs", "text")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    origins = load_config(
        RunConfig, path, ["tune.extend_to=64", "data.seq_len=64"]
    ).origins
    assert str(origins["model.max_seq_len"]) == "from another setting"
    assert str(origins["data.seq_len"]) == "command line"


def test_windows_within_the_original_length_keep_their_own_positions():
    positions = {"kind": "rope", "theta": 1e3}
    pattern = [
        {"window": 8, "positions": positions},
        {"window": 48, "positions": positions},
        {"window": None},
    ]
    local, wide, full = make_run({"extend_to": 64}, pattern=pattern).model.pattern
    assert local.positions.scaling is None
    assert wide.positions.scaling.factor == 2
    assert full.positions is None


def test_latent_attention_is_sharpened_as_a_whole():
    latent = {"kv_rank": 8, "rotary_dim": 4, "value_dim": 8}
    attention = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 12, "latent": latent}
    plain = make_model(attention=attention)
    model = extend_context(plain, ContextExtensionConfig(extend_to=128))
    scales = [config.score_scale(config.layer_kinds[0]) for config in (plain, model)]
    # DeepSeek-V2, appendix: the square of 0.1·ln(4) + 1.
    assert scales[1] / scales[0] == pytest.approx(1.1386294361119891**2)


@pytest.mark.parametrize(
    ("model", "tune", "message"),
    [
        (
            {"positions": {"kind": "learned"}},
            {},
            "positions.kind=learned have no RoPE to scale; set ",
        ),
        (
            {"positions": {"kind": "alibi"}},
            {},
            "positions.kind=alibi have no RoPE to scale; set ",
        ),
        ({}, {"extend_to": 32}, "32 tokens are no more than model.max_seq_len=32; "),
        (
            {"positions": {"scaling": SCALINGS["linear"]}},
            {},
            "the model has a scaling already: kind=linear, factor=4, max_seq_len=32; ",
        ),
        (  # extended before, to another length
            {"positions": {"scaling": SCALINGS["yarn"]}, "max_seq_len": 128},
            {"extend_to": 256},
            "the model has a scaling already: kind=yarn, factor=4, max_seq_len=128; ",
        ),
        (  # ... or by another scaling
            {"positions": {"scaling": SCALINGS["yarn"]}, "max_seq_len": 128},
            {"extend_by": "ntk"},
            "the model has a scaling already: kind=yarn, factor=4, max_seq_len=128; ",
        ),
        (
            {"attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 2}},
            {},
            "scaling.kind=ntk",
        ),
    ],
)
def test_what_cannot_be_extended_is_refused(model, tune, message):
    by = "ntk" if message.startswith("scaling.kind") else "yarn"
    plain = make_model(**model)
    with pytest.raises(MaxlmError, match=message.replace(".", r"\.")):
        extend_context(
            plain, ContextExtensionConfig(**{"extend_to": 128, "extend_by": by, **tune})
        )
