"""Rotary positions: rope_theta and rope_scaling of config.json beside keys and tensors
of GGUF files.

llama.cpp has no name for Llama 3's scaling: its conversion writes what each frequency
is divided by as the tensor ``rope_freqs.weight``, and LongRoPE's as two.
"""

import math
from typing import Any

import numpy as np

from maxlm.config import MaxlmError
from maxlm.huggingface.gguf.metadata import ConfigValues, GgufMetadata, Number
from maxlm.huggingface.gguf.tensors import place_tensor

ROPE_FREQS = "rope_freqs.weight"
FACTORS_LONG = "rope_factors_long.weight"
FACTORS_SHORT = "rope_factors_short.weight"
_DEFAULT_THETA = 10_000.0
_SCALING = "rope.scaling"


def read_rope(metadata: GgufMetadata, rotary_size: int) -> dict[str, Any]:
    """Reads ``rope_theta``, and ``rope_scaling`` where there is one; ``rotary_size``:
    the dimensions of a head that turn. Raises MaxlmError: a scaling of another kind."""
    theta = metadata.read_number("rope.freq_base", _DEFAULT_THETA)
    assert theta is not None
    values: dict[str, Any] = {"rope_theta": theta}
    scaling = _read_scaling(metadata)
    if ROPE_FREQS in metadata.tensors:
        factors = _read_vector(metadata, ROPE_FREQS)
        scaling = describe_factors(factors, theta, rotary_size)
    elif FACTORS_LONG in metadata.tensors:
        scaling = _read_longrope(metadata)
    if scaling is not None:
        values["rope_scaling"] = scaling
    return values


def write_rope(values: ConfigValues, rotary_size: int) -> dict[str, Number]:
    """Writes what :func:`read_rope` reads, but for the tensors of
    :func:`make_rope_tensors`. Raises MaxlmError: a scaling that GGUF has no word for."""
    metadata: dict[str, Number] = {
        "rope.dimension_count": rotary_size,
        "rope.freq_base": float(values["rope_theta"]),
    }
    scaling = values.get("rope_scaling")
    if not scaling:
        return metadata
    kind = scaling["rope_type"]
    original = scaling.get("original_max_position_embeddings")
    if kind == "linear":
        metadata[f"{_SCALING}.type"] = "linear"
        metadata[f"{_SCALING}.factor"] = float(scaling["factor"])
    elif kind == "yarn":
        metadata[f"{_SCALING}.type"] = "yarn"
        metadata[f"{_SCALING}.factor"] = float(scaling["factor"])
        metadata[f"{_SCALING}.original_context_length"] = int(original)
        for theirs, key in _YARN_NUMBERS.items():
            if theirs in scaling:
                metadata[f"{_SCALING}.{key}"] = float(scaling[theirs])
        others = {"attention_factor", "mscale", "mscale_all_dim"} & scaling.keys()
        if others:
            raise _has_no_word(f"rope_scaling.{min(others)}")
        if scaling.get("truncate", True) is False:
            raise _has_no_word("rope_scaling.truncate=false")
    elif kind == "longrope":
        metadata[f"{_SCALING}.original_context_length"] = int(original)
        metadata[f"{_SCALING}.attn_factor"] = _find_attention_factor(values, scaling)
    elif kind != "llama3":
        raise _has_no_word(f"rope_scaling.rope_type={kind}")
    return metadata


def make_rope_tensors(values: ConfigValues, rotary_size: int) -> dict[str, np.ndarray]:
    """Returns the tensors that say how frequencies are scaled, fp32."""
    scaling = values.get("rope_scaling") or {}
    kind = scaling.get("rope_type")
    if kind == "longrope":
        return {
            FACTORS_LONG: np.array(scaling["long_factor"], np.float32),
            FACTORS_SHORT: np.array(scaling["short_factor"], np.float32),
        }
    if kind == "llama3":
        factors = compute_llama3_factors(scaling, values["rope_theta"], rotary_size)
        return {ROPE_FREQS: factors.astype(np.float32)}
    return {}


def compute_llama3_factors(
    scaling: ConfigValues, theta: float, rotary_size: int
) -> np.ndarray:
    """Returns what Llama 3 divides each frequency by, fp64 [rotary_size / 2]: 1 for
    short wavelengths, ``factor`` for long ones, in between by the share of both
    (transformers' ``_compute_llama3_parameters``)."""
    wavelengths = 2 * math.pi * theta ** (np.arange(0, rotary_size, 2) / rotary_size)
    factor = scaling["factor"]
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def describe_factors(
    factors: np.ndarray, theta: float, rotary_size: int
) -> dict[str, Any] | None:
    """Returns the ``rope_scaling`` that divides frequencies by these factors: that of
    Llama 3 where there is one, else LongRoPE with them; None: all are 1.

    Llama 3's share is (original / wavelength - low) / (high - low): a line over the
    inverse wavelength, from which ``original`` and ``high`` follow for ``low`` = 1, as
    published models have it.
    """
    if np.all(factors == 1):
        return None
    factor = float(factors.max())
    wavelengths = 2 * math.pi * theta ** (np.arange(0, rotary_size, 2) / rotary_size)
    candidates: list[tuple[float, float]] = [(4.0, 8192.0)]
    if len(factors) == len(wavelengths):
        shares = (1 / factors - 1 / factor) / (1 - 1 / factor)
        is_between = (shares > 1e-6) & (shares < 1 - 1e-6)
        between = wavelengths[is_between]
        for wavelength, share in zip(between, shares[is_between], strict=True):
            # Of the usual 1 and 4, one frequency says the length.
            candidates.append((4.0, wavelength * (3 * share + 1)))
        if len(between) >= 2:
            inverse = 1 / between
            slope, start = np.polyfit(inverse, shares[is_between], 1)
            high = 1 - 1 / start
            candidates.append((high, slope * (high - 1)))
            candidates.append((round(high, 3), round(slope * (high - 1))))
    for high, original in candidates:
        if len(factors) != len(wavelengths) or high <= 1 or original < 1:
            continue
        scaling = {
            "rope_type": "llama3",
            "factor": float(str(np.float32(factor))),
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": round(original),
        }
        computed = compute_llama3_factors(scaling, theta, rotary_size)
        if np.allclose(computed, factors, rtol=1e-5):
            return scaling
    exact = _shorten(factors)
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "original_max_position_embeddings": 1,
        "short_factor": exact,
        "long_factor": exact,
        "attention_factor": 1.0,
    }


_YARN_NUMBERS = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}


def _read_scaling(metadata: GgufMetadata) -> dict[str, Any] | None:
    kind = metadata.read_text(f"{_SCALING}.type", "none")
    factor = metadata.read_number(f"{_SCALING}.factor")
    # As files before 2023-09 have it, for linear alone.
    linear_factor = metadata.read_number("rope.scale_linear")
    if factor is None and linear_factor not in (None, 1.0):
        kind = "linear"
        factor = linear_factor
    metadata.ignore(f"{_SCALING}.finetuned")
    original = metadata.read_size(f"{_SCALING}.original_context_length")
    if kind == "linear" and factor is not None:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and factor is not None:
        scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
        if original is not None:
            scaling["original_max_position_embeddings"] = original
        for theirs, key in _YARN_NUMBERS.items():
            number = metadata.read_number(f"{_SCALING}.{key}")
            if number is not None:
                scaling[theirs] = number
        return scaling
    if kind not in ("none", "linear", "yarn", "longrope"):
        message = f"{metadata.architecture}.{_SCALING}.type={kind!r} is not implemented"
        fix = "none, linear, yarn and longrope are"
        raise MaxlmError(message, where=metadata.where, fix=fix)
    return None


def _read_longrope(metadata: GgufMetadata) -> dict[str, Any]:
    key = f"{_SCALING}.original_context_length"
    scaling = {
        "rope_type": "longrope",
        "original_max_position_embeddings": metadata.require_size(key),
        "short_factor": _shorten(_read_vector(metadata, FACTORS_SHORT)),
        "long_factor": _shorten(_read_vector(metadata, FACTORS_LONG)),
    }
    longest = metadata.require_size("context_length")
    usual = _find_attention_factor({"max_position_embeddings": longest}, scaling)
    attention_factor = metadata.read_number(f"{_SCALING}.attn_factor", usual)
    assert attention_factor is not None
    if abs(attention_factor - usual) > 1e-6:
        scaling["attention_factor"] = attention_factor
    return scaling


def _shorten(numbers: np.ndarray) -> list[float]:
    """Returns the shortest decimals that fp32 numbers are nearest to."""
    return [float(str(np.float32(number))) for number in numbers]


def _read_vector(metadata: GgufMetadata, name: str) -> np.ndarray:
    place = metadata.tensors.get(name)
    if place is None or len(place.shape) != 1:
        fault = "lacks" if place is None else "has a matrix as"
        fix = "download it again"
        raise MaxlmError(f"it {fault} {name}", where=metadata.where, fix=fix)
    return place_tensor(place, name).dequantize().astype(np.float64)


def _find_attention_factor(values: ConfigValues, scaling: ConfigValues) -> float:
    """LongRoPE's factor of cosines and sines, by default that of its paper (Ding et al.
    2024, arXiv 2402.13753): √(1 + ln s / ln L)."""
    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])
    original = scaling["original_max_position_embeddings"]
    stretch = values["max_position_embeddings"] / original
    if stretch <= 1:
        return 1.0
    return math.sqrt(1 + math.log(stretch) / math.log(original))


def _has_no_word(setting: str) -> MaxlmError:
    message = f"GGUF has no word for {setting}"
    return MaxlmError(message, where="config.json", fix="leave it out of the model")
