"""Families of published models, one file each: its configuration and its names, both ways.

To add one, write its file and name it in :data:`FAMILIES`.
"""

from collections.abc import Mapping
from typing import Any

from maxlm.config import MaxlmError
from maxlm.models.families import (
    bart,
    bert,
    bloom,
    dbrx,
    deepseek,
    falcon,
    gemma,
    gpt2,
    grok,
    llama,
    mpt,
    phi,
    qwen,
    t5,
)
from maxlm.models.families.family import ModelFamily

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
        falcon.FALCON,
        phi.PHI,
        phi.PHI3,
        bloom.BLOOM,
        mpt.MPT,
        llama.MIXTRAL,
        grok.GROK1,
        dbrx.DBRX,
        deepseek.DEEPSEEK_V2,
        bert.BERT,
        t5.T5,
        bart.BART,
    )
}


def find_family(values: Mapping[str, Any], where: str) -> ModelFamily:
    """Returns the family that a config.json is of.

    Raises:
        MaxlmError: none that maxlm knows.
    """
    names = values.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise MaxlmError(
            f"architectures={names!r} is not a list of names",
            where=where,
            fix="take it from the published model",
        )
    for family in FAMILIES.values():
        known = {family.architecture, *family.other_architectures}
        kind = values.get("model_type")
        if not (known & {*names} or (not names and kind == family.model_type)):
            continue
        if kind not in (None, family.model_type):
            raise MaxlmError(
                f"model_type={kind!r} is not that of {family.architecture}",
                where=where,
                fix="take it from the published model",
            )
        return family
    named = ", ".join(names) or f"model_type={values.get('model_type')!r}"
    known = [family.architecture for family in FAMILIES.values()]
    near = [name for name in known if name.lower() == named.lower()]  # LLaMAForCausalLM
    raise MaxlmError(
        f"the architecture {named} is not supported",
        where=where,
        fix=f"did you mean {near[0]}?" if near else f"supported are {', '.join(known)}",
    )
