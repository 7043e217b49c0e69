"""Every family computes what another implementation does: transformers, or for Grok-1 a
few lines of torch. Weights are random, sizes odd, and in float64 only rounding is left
between the two."""

import copy
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from maxlm.huggingface.families import FAMILIES  # noqa: E402
from maxlm.huggingface.families.unsupported import KNOWN_UNSUPPORTED  # noqa: E402
from maxlm.run.convert import convert  # noqa: E402
from tests.parity import compare, measure  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
GENERATE = [name for name in measure.CASES if name != "bert"]

every = pytest.mark.parametrize("name", measure.CASES)


def test_every_family_is_here():
    assert {measure.case(name).family.name for name in measure.CASES} == set(
        FAMILIES.builtin_kinds()
    )


@every
def test_same_logits(name):
    assert measure.single(name) < 1e-4


@every
def test_same_logits_in_float64(name):
    # BLOOM's tanh has a constant of eight digits, and MiniMax's tables of decays are
    # fp32 in its file; all others agree within 1e-13.
    assert measure.double(name) < {"bloom": 1e-9, "minimax": 2e-6}.get(name, 1e-12)


@every
def test_documents_in_one_row_and_padding(name):
    if name in measure.DELTA_RULES:
        with jax.enable_x64(True):
            assert measure.packed(name, jnp.float64) < 1e-12
        return
    is_loose = name in ("t5_v1_1", "minimax")
    assert measure.packed(name) < (1e-4 if is_loose else 1e-5)


@pytest.mark.parametrize("name", GENERATE)
def test_continues_alike(name):
    here, there = measure.continued(name)
    assert [len(tokens) for tokens in here] == [measure.NEW] * 2
    assert here == there


@pytest.mark.parametrize("name", [name for name in measure.CASES if name != "grok1"])
def test_an_absent_key_means_what_it_means_there(name):
    case = measure.case(name)
    more = {"architectures": [type(case.model).__name__]}
    whole = case.model.config.to_dict() | more
    cls = type(case.model.config)
    for key in whole:
        bare = {other: value for other, value in whole.items() if other != key}
        try:
            here = compare.read(copy.deepcopy(bare), case.tensors)[1]
            there = compare.read(cls.from_dict(bare).to_dict() | more, case.tensors)[1]
        except Exception:  # either refuses
            continue
        assert there == here, key


@every
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back(name, dtype, tmp_path):
    model = measure.build(name).to(getattr(torch, dtype))
    first, run, again = (tmp_path / part for part in ("first", "run", "again"))
    model.save_pretrained(first)
    assert convert(first, run).family == measure.case(name).family.name
    convert(run, again)
    got = _tensors(again)
    want = compare.spell_as_published(measure.case(name).family, _tensors(first), got)
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert (got[key].dtype, got[key].shape) == (tensor.dtype, tensor.shape), key
        assert got[key].tobytes() == tensor.tobytes(), key
    if name == "minimax" and dtype == "bfloat16":
        return  # tables of decays are made anew, in fp32
    tokens = measure.batch(name)
    # Copied: how torch rounds a product follows from where its operands lie in files.
    models = [copy.deepcopy(_loaded(name, folder)) for folder in (first, again)]
    logits = [measure.theirs(model, tokens) for model in models]
    np.testing.assert_array_equal(*logits)


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    return compare.tensors_of(folder)[1]


def _loaded(name: str, folder: Path) -> Any:
    if name == "grok1":
        model = measure.build(name)
        tensors = {
            key: torch.tensor(x.astype(np.float32))
            for key, x in _tensors(folder).items()
        }
        model.load_state_dict(tensors)  # all of them, and no other
        return model
    cls = type(measure.case(name).model)
    kinds = {
        "attn_implementation": "eager",
        "experts_implementation": "eager",
        "dtype": "auto",
    }
    model, loading = cls.from_pretrained(folder, output_loading_info=True, **kinds)
    ignored = measure.case(name).family.ignored_tensors
    loading["missing_keys"] = [
        key
        for key in loading["missing_keys"]
        if not any(fnmatch(key, pattern) for pattern in ignored)
    ]
    assert not any(loading.values()), loading
    return model.eval()


def test_every_decoder_of_transformers_is_supported_or_named():
    from transformers.models.auto import modeling_auto

    supported = {
        model_type
        for _, family in FAMILIES.items()
        for model_type in (family.model_type, *family.other_model_types)
    }
    known = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
    assert not known - supported - KNOWN_UNSUPPORTED.keys()
