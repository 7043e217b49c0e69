"""Families of published models: their configurations and their names, both ways.

To add one, write its file and name it in ``FAMILIES``, or register it from outside:
``FAMILIES.register("name", ModelFamily(...))``, or an installed package's entry point
of the group ``maxlm.families``.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from maxlm.config import MaxlmError
from maxlm.config.registry import Registry
from maxlm.huggingface.families.family import ModelFamily
from maxlm.huggingface.families.reader import ConfigReader
from maxlm.huggingface.families.unsupported import (
    FILE_ALONE,
    KNOWN_UNSUPPORTED,
    find_unsupported,
    get_class_stem,
)

_FOLDER = "maxlm.huggingface.families"
FAMILIES = Registry[ModelFamily](
    "family",
    {
        "gpt2": f"{_FOLDER}.gpt2:GPT2",
        "llama": f"{_FOLDER}.llama:LLAMA",
        "mistral": f"{_FOLDER}.llama:MISTRAL",
        "qwen2": f"{_FOLDER}.qwen:QWEN2",
        "qwen3": f"{_FOLDER}.qwen:QWEN3",
        "qwen3_moe": f"{_FOLDER}.qwen:QWEN3_MOE",
        "gemma": f"{_FOLDER}.gemma:GEMMA",
        "gemma2": f"{_FOLDER}.gemma:GEMMA2",
        "gemma3": f"{_FOLDER}.gemma:GEMMA3",
        "gemma3n": f"{_FOLDER}.gemma3n:GEMMA3N",
        "gemma4": f"{_FOLDER}.gemma4:GEMMA4",
        "falcon": f"{_FOLDER}.bloom:FALCON",
        "phi": f"{_FOLDER}.phi:PHI",
        "phi3": f"{_FOLDER}.phi:PHI3",
        "bloom": f"{_FOLDER}.bloom:BLOOM",
        "mpt": f"{_FOLDER}.mosaic:MPT",
        "mixtral": f"{_FOLDER}.llama:MIXTRAL",
        "grok1": f"{_FOLDER}.grok:GROK1",
        "dbrx": f"{_FOLDER}.mosaic:DBRX",
        "deepseek_v2": f"{_FOLDER}.deepseek:DEEPSEEK_V2",
        "deepseek_v3": f"{_FOLDER}.deepseek:DEEPSEEK_V3",
        "deepseek_v32": f"{_FOLDER}.deepseek_sparse:DEEPSEEK_V32",
        "glm_moe_dsa": f"{_FOLDER}.deepseek_sparse:GLM_MOE_DSA",
        "mimo_v2_flash": f"{_FOLDER}.mimo:MIMO_V2_FLASH",
        "apertus": f"{_FOLDER}.apertus:APERTUS",
        "ministral3": f"{_FOLDER}.ministral:MINISTRAL3",
        "lfm2_moe": f"{_FOLDER}.lfm2:LFM2_MOE",
        "afmoe": f"{_FOLDER}.afmoe:AFMOE",
        "granitemoeshared": f"{_FOLDER}.granite_moe:GRANITE_MOE_SHARED",
        "hy_v3": f"{_FOLDER}.hunyuan_3:HY_V3",
        "flex_olmo": f"{_FOLDER}.olmo:FLEX_OLMO",
        "olmo": f"{_FOLDER}.olmo:OLMO",
        "vaultgemma": f"{_FOLDER}.gemma:VAULTGEMMA",
        "helium": f"{_FOLDER}.helium:HELIUM",
        "nanochat": f"{_FOLDER}.nanochat:NANOCHAT",
        "gpt_oss": f"{_FOLDER}.gpt_oss:GPT_OSS",
        "glm4_moe": f"{_FOLDER}.glm_moe:GLM4_MOE",
        "qwen2_moe": f"{_FOLDER}.qwen_moe:QWEN2_MOE",
        "dots1": f"{_FOLDER}.dots:DOTS1",
        "llama4": f"{_FOLDER}.llama4:LLAMA4",
        "glm4_moe_lite": f"{_FOLDER}.deepseek:GLM4_MOE_LITE",
        "olmoe": f"{_FOLDER}.olmoe:OLMOE",
        "minimax_m2": f"{_FOLDER}.minimax:MINIMAX_M2",
        "granitemoe": f"{_FOLDER}.granite_moe:GRANITE_MOE",
        "ernie4_5_moe": f"{_FOLDER}.ernie_moe:ERNIE4_5_MOE",
        "exaone_moe": f"{_FOLDER}.exaone_moe:EXAONE_MOE",
        "hunyuan_v1_moe": f"{_FOLDER}.hunyuan_moe:HUNYUAN_V1_MOE",
        "ministral": f"{_FOLDER}.ministral:MINISTRAL",
        "stablelm": f"{_FOLDER}.stablelm:STABLELM",
        "starcoder2": f"{_FOLDER}.starcoder2:STARCODER2",
        "cohere": f"{_FOLDER}.cohere:COHERE",
        "glm": f"{_FOLDER}.glm:GLM",
        "glm4": f"{_FOLDER}.glm:GLM4",
        "ernie4_5": f"{_FOLDER}.ernie:ERNIE4_5",
        "seed_oss": f"{_FOLDER}.seed_oss:SEED_OSS",
        "mamba2": f"{_FOLDER}.mamba2:MAMBA2",
        "bamba": f"{_FOLDER}.bamba:BAMBA",
        "granitemoehybrid": f"{_FOLDER}.granite_hybrid:GRANITE_HYBRID",
        "mamba": f"{_FOLDER}.mamba:MAMBA",
        "falcon_mamba": f"{_FOLDER}.mamba:FALCON_MAMBA",
        "jamba": f"{_FOLDER}.jamba:JAMBA",
        "lfm2": f"{_FOLDER}.lfm2:LFM2",
        "falcon_h1": f"{_FOLDER}.falcon_h1:FALCON_H1",
        "zamba": f"{_FOLDER}.zamba:ZAMBA",
        "zamba2": f"{_FOLDER}.zamba2:ZAMBA2",
        "minimax": f"{_FOLDER}.minimax_01:MINIMAX",
        "nemotron_h": f"{_FOLDER}.nemotron_h:NEMOTRON_H",
        "cohere2": f"{_FOLDER}.cohere:COHERE2",
        "smollm3": f"{_FOLDER}.smollm3:SMOLLM3",
        "olmo2": f"{_FOLDER}.olmo:OLMO2",
        "olmo3": f"{_FOLDER}.olmo:OLMO3",
        "exaone4": f"{_FOLDER}.exaone:EXAONE4",
        "granite": f"{_FOLDER}.granite:GRANITE",
        "hunyuan_v1_dense": f"{_FOLDER}.hunyuan:HUNYUAN_V1_DENSE",
        "arcee": f"{_FOLDER}.arcee:ARCEE",
        "nemotron": f"{_FOLDER}.nemotron:NEMOTRON",
        "qwen3_next": f"{_FOLDER}.qwen_hybrid:QWEN3_NEXT",
        "qwen3_5": f"{_FOLDER}.qwen_hybrid:QWEN3_5",
        "qwen3_5_moe": f"{_FOLDER}.qwen_hybrid:QWEN3_5_MOE",
        "olmo_hybrid": f"{_FOLDER}.olmo_hybrid:OLMO_HYBRID",
        "kimi_linear": f"{_FOLDER}.kimi_linear:KIMI_LINEAR",
        "bailing_hybrid": f"{_FOLDER}.bailing_hybrid:BAILING_HYBRID",
        "gpt_neox": f"{_FOLDER}.gpt_neox:GPT_NEOX",
        "opt": f"{_FOLDER}.opt:OPT",
        "gptj": f"{_FOLDER}.gptj:GPTJ",
        "gpt_bigcode": f"{_FOLDER}.gpt_bigcode:GPT_BIGCODE",
        "bert": f"{_FOLDER}.bert:BERT",
        "t5": f"{_FOLDER}.t5:T5",
        "bart": f"{_FOLDER}.bart:BART",
    },
    plural="families",
)


def find_family(hf_config: Mapping[str, Any], source: str) -> ModelFamily:
    """Returns the family that a config.json is of."""
    names = ConfigReader(hf_config, source).names("architectures")
    kind = hf_config.get("model_type")
    for _, family in FAMILIES.items():
        known = {
            family.hf_architecture,
            family.hf_classifier,
            *family.other_hf_architectures,
        }
        if not (known & {*names} or (not names and kind == family.model_type)):
            continue
        if kind not in (None, family.model_type, *family.other_model_types):
            message = f"model_type={kind!r} is not that of {family.hf_architecture}"
            raise MaxlmError(
                message, where=source, fix="take it from the published model"
            )
        return family
    raise _make_refusal(names, kind, source)


def _make_refusal(
    architectures: list[str], model_type: object, source: str
) -> MaxlmError:
    """Returns the error of a config.json that is of no family: what its model type
    needs and the nearest family, where they are known, or near names."""
    named = ", ".join(architectures) or f"model_type={model_type!r}"
    message = f"the architecture {named} is not supported"
    known = find_unsupported(model_type, architectures)
    if known is not None:
        needs, nearest = KNOWN_UNSUPPORTED[known]
        message = f"{message}: {known} needs {needs}"
        name = FAMILIES.get(nearest).hf_architecture
        fix = f"convert a model of a supported family, the nearest is {name}"
        if needs == FILE_ALONE:
            fix = f"{fix}, or write that file (docs/convert.md)"
        return MaxlmError(message, where=source, fix=fix)
    by_stem: dict[str, str] = {}
    by_model_type: dict[str, str] = {}
    for _, family in FAMILIES.items():
        by_stem[get_class_stem(family.hf_architecture).lower()] = family.hf_architecture
        by_model_type[family.model_type] = family.hf_architecture
    # LLaMAForCausalLM is in early files.
    near = get_close_matches(get_class_stem(named).lower(), by_stem, n=1)
    near_type = get_close_matches(str(model_type), by_model_type, n=1)
    if near:
        fix = f"did you mean {by_stem[near[0]]}?"
    elif near_type:
        fix = f"did you mean {by_model_type[near_type[0]]}?"
    else:
        fix = (
            "docs/families.md lists those that are, docs/convert.md says how to add one"
        )
    return MaxlmError(message, where=source, fix=fix)
