"""Families of published models: their configurations and their names, both ways.

To add one, write its file and name it in :data:`FAMILIES`.
"""

from collections.abc import Mapping
from typing import Any

from maxlm.config import MaxlmError
from maxlm.huggingface.families import (
    bart,
    bert,
    bloom,
    deepseek,
    gemma,
    gpt2,
    grok,
    llama,
    mosaic,
    phi,
    qwen,
    t5,
)
from maxlm.huggingface.families.family import ModelFamily

FAMILIES: Mapping[str, ModelFamily] = {
    family.name: family
    for family in (
        gpt2.GPT2,
        llama.LLAMA,
        llama.MISTRAL,
        qwen.QWEN2,
        qwen.QWEN3,
        qwen.QWEN3_MOE,
        gemma.GEMMA,
        gemma.GEMMA2,
        gemma.GEMMA3,
        bloom.FALCON,
        phi.PHI,
        phi.PHI3,
        bloom.BLOOM,
        mosaic.MPT,
        llama.MIXTRAL,
        grok.GROK1,
        mosaic.DBRX,
        deepseek.DEEPSEEK_V2,
        bert.BERT,
        t5.T5,
        bart.BART,
    )
}


def find_family(hf_config: Mapping[str, Any], source: str) -> ModelFamily:
    """Returns the family that a config.json is of."""
    names = hf_config.get("architectures") or []
    kind = hf_config.get("model_type")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        what = f"architectures={names!r} is not a list of names"
        raise MaxlmError(what, where=source, fix="take it from the published model")
    for family in FAMILIES.values():
        known = {
            family.hf_architecture,
            family.hf_classifier,
            *family.other_hf_architectures,
        }
        if not (known & {*names} or (not names and kind == family.model_type)):
            continue
        if kind not in (None, family.model_type):
            what = f"model_type={kind!r} is not that of {family.hf_architecture}"
            raise MaxlmError(what, where=source, fix="take it from the published model")
        return family
    named = ", ".join(names) or f"model_type={kind!r}"
    supported = [family.hf_architecture for family in FAMILIES.values()]
    near = [
        name for name in supported if name.lower() == named.lower()
    ]  # LLaMAForCausalLM
    what = f"the architecture {named} is not supported"
    fix = (
        f"did you mean {near[0]}?" if near else f"supported are {', '.join(supported)}"
    )
    raise MaxlmError(what, where=source, fix=fix)
