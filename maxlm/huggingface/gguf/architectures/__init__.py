"""Architectures by llama.cpp's names. To add one, declare an
:class:`~maxlm.huggingface.gguf.architectures.architecture.Architecture` here, and name
it in ``ARCHITECTURES``."""

from difflib import get_close_matches

from maxlm.config import MaxlmError
from maxlm.huggingface.gguf.architectures import (
    deepseek,
    gemma,
    layer_norm,
    llama,
    qwen,
)
from maxlm.huggingface.gguf.architectures.architecture import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        llama.LLAMA,
        qwen.QWEN2,
        qwen.QWEN3,
        qwen.QWEN2_MOE,
        qwen.QWEN3_MOE,
        gemma.GEMMA,
        gemma.GEMMA2,
        gemma.GEMMA3,
        llama.PHI3,
        llama.GRANITE,
        llama.OLMO2,
        llama.OLMOE,
        llama.SMOLLM3,
        deepseek.DEEPSEEK2,
        layer_norm.PHI2,
        layer_norm.GPT2,
        layer_norm.GPT_NEOX,
        layer_norm.FALCON,
        layer_norm.BLOOM,
        layer_norm.STARCODER2,
        layer_norm.STABLELM,
        layer_norm.COMMAND_R,
    )
}


def find_architecture(name: object, where: str) -> Architecture:
    """Returns the architecture of a name in ``general.architecture``. Raises
    MaxlmError, with near names."""
    if not isinstance(name, str):
        message = "its metadata lacks general.architecture"
        raise MaxlmError(message, where=where, fix="use the file of a language model")
    architecture = ARCHITECTURES.get(name)
    if architecture is not None:
        return architecture
    near = get_close_matches(name, ARCHITECTURES, n=1)
    listed = ", ".join(ARCHITECTURES)
    fix = f"did you mean {near[0]}?" if near else f"those that are: {listed}"
    message = f"the architecture {name[:80]!r} is not supported"
    raise MaxlmError(message, where=where, fix=fix)


def find_hf_architecture(hf_architecture: str) -> Architecture:
    """Returns the architecture that models of a class of config.json's are written as.
    Raises MaxlmError: llama.cpp's is not known here."""
    for architecture in ARCHITECTURES.values():
        names = (architecture.hf_architecture, *architecture.other_hf_architectures)
        if hf_architecture in names:
            return architecture
    listed = ", ".join(ARCHITECTURES)
    message = f"{hf_architecture} cannot be written as GGUF"
    raise MaxlmError(message, fix=f"architectures that can: {listed}")
