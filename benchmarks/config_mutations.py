"""Mutated config.json files, and random models, against transformers.

    python -m benchmarks.config_mutations [--cases llama,t5] [--verbose]
    python -m benchmarks.config_mutations --random 96 [--seed 1]

Every field of the config.json of a tiny model of each family is deleted and changed,
and fields of other models are added. For each of these files one of three must hold:
maxlm raises an error, transformers cannot build or run a model of it, or a random model
that transformers makes of it has the same logits here (both in float64, with the
largest difference below 1e-9 of the largest logit). Anything else is a silent
difference, and the exit code is 1. ``--random`` makes models of other sizes and takes them through `maxlm
convert` and back as well: every tensor comes back bit for bit. Needs the `parity`
packages.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
import transformers
from pydantic import ValidationError

from maxlm.config import MaxlmError
from maxlm.config.load import load_config
from maxlm.huggingface.checkpoint import RunCheckpointReader
from maxlm.run.config import RunConfig
from maxlm.run.convert import convert
from tests.parity import compare, tiny
from tests.parity.drawn import LENGTH, draw_settings
from tests.parity.measure import SOURCE, Batch, all_double, relative, theirs

Values = dict[str, Any]
TOLERANCE = 1e-9
CASES = str.split("""gpt2 llama llama3 llama_yarn mistral qwen2_window qwen3 qwen3_moe gemma gemma2
    gemma3 falcon_40b phi phi3 bloom mpt mixtral dbrx deepseek_v2 bert t5 bart
    gpt_oss lfm2 mamba2 olmo2 smollm3""")
# Fields of other models, old or new; each is added where a config does not have it.
FOREIGN: Values = json.loads("""{"partial_rotary_factor": 0.6, "rope_theta": 500.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rotary_pct": 0.25, "head_dim": 6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "num_key_value_heads": 1,
    "num_hidden_layers": 1, "sliding_window": 4, "use_sliding_window": true, "qk_layernorm": true,
    "layer_types": ["full_attention"], "sliding_window_pattern": 2, "attention_bias": true,
    "mlp_bias": true, "use_bias": true, "use_qk_norm": true, "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 1.5, "query_pre_attn_scalar": 3, "attention_multiplier": 0.3,
    "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 4.0, "alibi": true,
    "logit_scale": 0.5, "clip_qkv": 0.1, "parallel_attn": false, "hidden_act": "relu",
    "hidden_activation": "relu", "rms_norm_eps": 0.1, "norm_topk_prob": true,
    "use_bidirectional_attention": true, "per_layer_config": {"0": {"rms_norm_eps": 0.1}},
    "quantization_config": {"quant_method": "fp8"}}""")
ROPES: list[Values] = json.loads("""[{"rope_type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 2.0, "truncate": false}, {"rope_type": "dynamic", "factor": 2},
    {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}]""")
WORDS = ("gelu", "relu", "gated-silu", "group_limited_greedy", 1)
# What every configuration of transformers has besides; changed once each.
BOOKKEEPING = {*transformers.PretrainedConfig().to_dict()} - {
    "is_encoder_decoder",
    "model_type",
}


def mutations(base: Values, added: Values = FOREIGN) -> Iterator[tuple[str, Values]]:
    """Each changed config.json, and what was done to it."""
    for key in base:
        yield f"del {key}", {k: v for k, v in base.items() if k != key}
        others = changed(base[key])[: 1 if key in BOOKKEEPING else None]
        others += ROPES if key == "rope_parameters" else []
        different = {json.dumps(other): other for other in others if other != base[key]}
        for text, other in different.items():
            yield f"{key}={text}", base | {key: other}
    for key in [key for key in added if key not in base]:
        yield f"add {key}={added[key]!r}", base | {key: added[key]}


def changed(value: Any) -> list[Any]:
    """Other values of a field, by its type, and values of other types."""
    if isinstance(value, dict):
        inside = mutations(
            value, {"partial_rotary_factor": 0.6, "factor": 0.6, "rope_theta": 3.0}
        )
        return [*(mutated for _, mutated in inside), {}, [1], None]
    if isinstance(value, list):
        return [value[::-1], value[:1] * len(value), [], None]
    if isinstance(value, bool):
        return [not value, str(value).lower(), None]
    if isinstance(value, int):
        return [value + 1, value * 2, 0, -1, str(value), None]
    if isinstance(value, float):
        return [value * 2, value / 3, 0.0, -1.0, str(value), None]
    return [*WORDS, None] if isinstance(value, str) else [1, 0.5, True, "gelu"]


def whole_config(name: str, settings: Values) -> tuple[Any, Values]:
    """A model's class and its config.json, with all defaults."""
    architecture = tiny.CASES[name][0]
    cls = getattr(transformers, architecture)
    values = cls.config_class(**settings).to_dict() | {"architectures": [architecture]}
    return cls, json.loads(json.dumps(values))


def batch_of(values: Values) -> Batch:
    """What a model of a config.json is shown: one row."""
    draw = np.random.default_rng(0)
    rows = values["vocab_size"]
    types = None
    source = None
    if "type_vocab_size" in values:
        types = draw.integers(0, values["type_vocab_size"], (1, LENGTH))
    if values["is_encoder_decoder"]:
        source = draw.integers(0, rows, (1, SOURCE))
    return Batch(draw.integers(0, rows, (1, LENGTH)), types, source)


_known: dict[Any, Any] = {}  # tensors by a model's key, logits by that and our config


class Theirs:
    """A random model of a config.json, made and run by transformers in float64, with
    parameters that ``dtype`` holds. Raises whatever transformers does for a config that
    it does not take."""

    def __init__(self, cls: Any, values: Values, batch: Batch, dtype: Any = np.float32):
        config = cls.config_class.from_dict(json.loads(json.dumps(values)))
        config._attn_implementation = config._experts_implementation = "eager"
        with all_double(), torch.no_grad():
            self.model = cls(config).eval()
            torch.manual_seed(0)
            tiny.randomize(self.model, untie=values.get("tie_word_embeddings") is False)
            for saved in self.model.state_dict().values():
                saved.copy_(torch.tensor(saved.numpy().astype(dtype).astype(float)))
            self.logits = theirs(self.model, batch)
        state = self.model.state_dict()
        places = {
            tensor.data_ptr() for tensor in state.values()
        }  # shared ones are saved once
        self.key = (
            cls,
            len(places),
            *((name, x.shape, float(x.sum())) for name, x in state.items()),
        )

    def tensors(self) -> dict[str, np.ndarray]:
        """As it is saved, under the names of published files."""
        if self.key not in _known:
            with tempfile.TemporaryDirectory() as folder:
                self.model.save_pretrained(folder)
                _known[self.key] = compare.tensors_of(Path(folder))[1]
        return _known[self.key]

    def start_id(self) -> int | None:
        """The token that its decoder starts with, beside an encoder."""
        if not self.model.config.is_encoder_decoder:
            return None
        chosen = self.model.generation_config
        start = chosen.decoder_start_token_id
        return chosen.bos_token_id if start is None else start


def our_logits(config: Any, params: dict[str, np.ndarray], batch: Batch) -> np.ndarray:
    """[1, S, V], in float64."""
    more: Values = {} if batch.types is None else {"types": batch.types}
    if batch.source is not None:
        places = np.broadcast_to(np.arange(SOURCE), batch.source.shape)
        more["inputs"] = (batch.source, places, None)
    with jax.enable_x64(True):
        return compare.logits(config, params, batch.tokens, dtype=jnp.float64, **more)


def outcome(cls: Any, values: Values, batch: Batch, names: Any) -> tuple[str, str]:
    """What became of a config.json, and why."""
    try:
        compare.read(values, names)
    except (MaxlmError, ValidationError) as error:
        return "refused", str(error).replace("\n", " ")
    try:
        theirs = Theirs(cls, values, batch)
    # transformers has no error of its own for a config that it does not take.
    except Exception as error:
        lines = f"{type(error).__name__}: {error}".splitlines()
        return "transformers refuses", lines[0]
    try:
        family, config = compare.read(values, theirs.tensors())
        entries = family.list_entries(config, theirs.tensors())
        used = {name for entry in entries for name in (entry.theirs, *entry.aliases)}
        assert used >= theirs.tensors().keys(), "tensors left over"
        key = theirs.key, config.model_dump_json()
        if key not in _known:
            params = compare.parameters(config, entries, theirs.tensors())
            _known[key] = our_logits(config, params, batch)
    except (
        MaxlmError,
        ValidationError,
        AssertionError,
        KeyError,
    ) as error:  # other tensors
        return "refused", str(error).replace("\n", " ")
    if hasattr(config, "start_id") and theirs.start_id() not in (None, config.start_id):
        return "DIFFERS", f"start_id {config.start_id} here, {theirs.start_id()} there"
    if _known[key].shape != theirs.logits.shape:
        return "DIFFERS", "shapes of logits"
    error = relative(_known[key], theirs.logits)
    return "equal" if error < TOLERANCE else "DIFFERS", f"{error:.0e}"


def mutate(cases: list[str], verbose: bool) -> bool:
    """Whether no mutation differs without a word; prints a line a case."""
    total: Counter[str] = Counter()
    for name in cases:
        start = time.monotonic()
        counts = Counter[str]()
        few = {}
        if name == "gemma3":
            few = {"num_hidden_layers": 3, "sliding_window_pattern": 2}
        cls, base = whole_config(name, tiny.CASES[name][1] | few)
        batch = batch_of(base)
        names = Theirs(cls, base, batch).tensors()
        for label, values in [("base", base), *mutations(base)]:
            verdict, reason = outcome(cls, values, batch, names)
            counts[verdict] += 1
            if verbose or verdict == "DIFFERS":
                print(f"  {name}: {label}: {verdict} ({reason})", flush=True)
            assert verdict == "equal" or label != "base", reason
        total += counts
        print(f"{name}: {dict(counts)}, {time.monotonic() - start:.0f} s", flush=True)
    print(f"all: {total.total()} configs: {dict(total)}")
    return not total["DIFFERS"]


def there_and_back(cls: Any, values: Values, dtype: str) -> float:
    """The error of logits after `maxlm convert`; infinite if tensors do not come back
    bit for bit.

    Raises:
        MaxlmError: the model is refused.
    """
    batch = batch_of(values)
    theirs = Theirs(cls, values, batch, np.dtype(getattr(ml_dtypes, dtype, dtype)))
    with tempfile.TemporaryDirectory() as home:
        first, run, again = (Path(home) / part for part in ("first", "run", "again"))
        theirs.model.to(getattr(torch, dtype)).save_pretrained(first)
        convert(first, run)
        convert(run, again)
        want, got = (
            {
                name: (x.dtype, x.shape, x.tobytes())
                for name, x in compare.tensors_of(f)[1].items()
            }
            for f in (first, again)
        )
        reader = RunCheckpointReader(run / "checkpoints")
        params = {
            name: reader.open(name).read().astype(float) for name in reader.shapes
        }
        config = load_config(RunConfig, run / "config.yaml").value.model
    error = relative(our_logits(config, params, batch), theirs.logits)
    return error if want == got else float("inf")


def draw_models(cases: list[str], number: int, seed: int, verbose: bool) -> bool:
    """Whether so many random models are all equal or refused."""
    draw = random.Random(seed)
    counts = Counter[str]()
    worst = 0.0
    for index in range(number):
        name = cases[index % len(cases)]
        dtype = draw.choice(["float32", "bfloat16"])
        settings = draw_settings(*tiny.CASES[name], draw)
        cls, values = whole_config(name, settings)
        try:
            error = there_and_back(cls, values, dtype)
            worst = max(worst, error)
            verdict = "equal" if error < TOLERANCE else "DIFFERS"
            reason = f"{error:.0e}"
        except MaxlmError as refusal:
            verdict = "refused"
            reason = str(refusal)
        counts[verdict] += 1
        if verbose or verdict != "equal":
            print(f"  {name}, {dtype}: {verdict} ({reason})", flush=True)
    print(f"{number} random models: {dict(counts)}, largest error {worst:.0e}")
    return not counts["DIFFERS"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--cases", help="of tests/parity/cases.yaml; default: one a family"
    )
    parser.add_argument("--random", type=int, help="so many random models instead")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--verbose", action="store_true", help="a line each config")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    cases = options.cases.split(",") if options.cases else []
    if options.random:
        settings = cases or [*tiny.CASES], options.random, options.seed, options.verbose
        return 0 if draw_models(*settings) else 1
    return 0 if mutate(cases or CASES, options.verbose) else 1


if __name__ == "__main__":
    sys.exit(main())
