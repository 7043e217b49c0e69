"""Parameters of every preset beside the published figure, as a Markdown table.

    python benchmarks/parameter_counts.py [--write]

Nothing is allocated. --write puts the table between the markers of docs/families.md.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp

from maxlm.config.assets import find_asset
from maxlm.config.load import load_config
from maxlm.models.architectures import ModelConfig
from maxlm.models.params import flatten_names, param_specs
from maxlm.plan.layout import count_active_parameters
from maxlm.run.config import RunConfig
from maxlm.sharding import AxisRules

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
MARKERS = "<!-- sizes -->\n", "<!-- /sizes -->\n"

# The family (maxlm.huggingface.families) of presets whose names start so; the longest start
# counts.
FAMILIES = {
    "gpt2": "gpt2",
    "llama": "llama",
    "smollm2": "llama",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_30b_a3b": "qwen3_moe",
    "qwen3_235b_a22b": "qwen3_moe",
    "qwen3_next": "qwen3_next",
    "gemma_": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3n": "gemma3n",
    "gemma4": "gemma4",
    "falcon": "falcon",
    "phi_": "phi",
    "phi3": "phi3",
    "bloom": "bloom",
    "mpt": "mpt",
    "grok": "grok1",
    "dbrx": "dbrx",
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "deepseek_v3_2": "deepseek_v32",
    "glm_5": "glm_moe_dsa",
    "ministral3": "ministral3",
    "lfm2_8b": "lfm2_moe",
    "trinity": "afmoe",
    "mimo": "mimo_v2_flash",
    "olmo_": "olmo",
    "apertus": "apertus",
    "nanochat": "nanochat",
    "kimi_k2": "deepseek_v3",
    "kimi_linear": "kimi_linear",
    "gpt_oss": "gpt_oss",
    "glm4_5": "glm4_moe",
    "qwen1_5_moe": "qwen2_moe",
    "qwen2_57b": "qwen2_moe",
    "dots": "dots1",
    "llama4": "llama4",
    "minimax_m2": "minimax_m2",
    "granite3_1b": "granitemoe",
    "granite3_3b": "granitemoe",
    "ernie4_5_21b": "ernie4_5_moe",
    "ernie4_5_300b": "ernie4_5_moe",
    "k_exaone": "exaone_moe",
    "hunyuan_a13b": "hunyuan_v1_moe",
    "olmoe": "olmoe",
    "glm4_7_flash": "glm4_moe_lite",
    "mamba_": "mamba",
    "mamba2": "mamba2",
    "codestral_mamba": "mamba2",
    "falcon_mamba": "falcon_mamba",
    "falcon_h1": "falcon_h1",
    "jamba": "jamba",
    "bamba": "bamba",
    "granite4": "granitemoehybrid",
    "nemotron_h": "nemotron_h",
    "zamba_": "zamba",
    "zamba2": "zamba2",
    "nemotron3": "nemotron_h",
    "lfm2": "lfm2",
    "minimax_text": "minimax",
    "ministral": "ministral",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
    "command_r": "cohere",
    "aya_23": "cohere",
    "glm_4": "glm",
    "glm4": "glm4",
    "ernie4_5": "ernie4_5",
    "seed_oss": "seed_oss",
    "phi4": "phi3",
    "command_r7b": "cohere2",
    "smollm3": "smollm3",
    "olmo2": "olmo2",
    "olmo3": "olmo3",
    "exaone4": "exaone4",
    "granite3": "granite",
    "hunyuan_7b": "hunyuan_v1_dense",
    "afm": "arcee",
    "minitron": "nemotron",
    "pythia": "gpt_neox",
    "gpt_neox": "gpt_neox",
    "opt": "opt",
    "gptj": "gptj",
    "starcoder_": "gpt_bigcode",
    "bert": "bert",
    "t5": "t5",
    "ul2": "t5",
    "bart": "bart",
}

# Parameters, and those active per token, as the paper or model card states them.
PUBLISHED: dict[str, tuple[str, ...]] = {
    "gpt2": ("124M",),
    "gpt2_medium": ("355M",),
    "gpt2_large": ("774M",),
    "gpt2_xl": ("1558M",),
    "llama_7b": ("6.7B",),
    "llama_13b": ("13.0B",),
    "llama_33b": ("32.5B",),
    "llama_65b": ("65.2B",),
    "llama2_7b": ("7B",),
    "llama2_13b": ("13B",),
    "llama2_70b": ("70B",),
    "llama3_8b": ("8B",),
    "llama3_70b": ("70B",),
    "llama3_405b": ("405B",),
    "llama3_1_8b": ("8B",),
    "llama3_1_70b": ("70B",),
    "llama3_1_405b": ("405B",),
    "llama3_2_1b": ("1.23B",),
    "llama3_2_3b": ("3.21B",),
    "llama3_3_70b": ("70B",),
    "smollm2_135m": ("135M",),
    "smollm2_360m": ("360M",),
    "smollm2_1_7b": ("1.7B",),
    "mistral_7b": ("7.3B",),
    "mixtral_8x7b": ("47B", "13B"),
    "mixtral_8x22b": ("141B", "39B"),
    "qwen2_5_0_5b": ("0.49B",),
    "qwen2_5_1_5b": ("1.54B",),
    "qwen2_5_3b": ("3.09B",),
    "qwen2_5_7b": ("7.61B",),
    "qwen2_5_14b": ("14.7B",),
    "qwen2_5_32b": ("32.5B",),
    "qwen2_5_72b": ("72.7B",),
    "qwen3_0_6b": ("0.6B",),
    "qwen3_1_7b": ("1.7B",),
    "qwen3_4b": ("4.0B",),
    "qwen3_8b": ("8.2B",),
    "qwen3_14b": ("14.8B",),
    "qwen3_32b": ("32.8B",),
    "qwen3_30b_a3b": ("30.5B", "3.3B"),
    "qwen3_235b_a22b": ("235B", "22B"),
    "gemma_2b": ("2.51B",),
    "gemma_7b": ("8.54B",),
    "gemma2_2b": ("2.61B",),
    "gemma2_9b": ("9.24B",),
    "gemma2_27b": ("27.2B",),
    "gemma3_270m": ("270M",),
    "gemma3_1b": ("1.00B",),
    "gemma3_4b": ("3.88B",),
    "gemma3_12b": ("11.77B",),
    "gemma3_27b": ("27.02B",),
    "gemma3n_e2b": (),
    "gemma3n_e4b": (),
    "gemma4_e2b": (),
    "gemma4_e4b": (),
    "gemma4_26b_a4b": ("25.2B", "3.8B"),
    "gemma4_31b": ("30.7B",),
    "falcon_7b": ("7B",),
    "falcon_40b": ("40B",),
    "falcon_180b": ("180B",),
    "phi_1_5": ("1.3B",),
    "phi_2": ("2.7B",),
    "phi3_mini": ("3.8B",),
    "phi3_medium": ("14B",),
    "bloom_560m": ("559M",),
    "bloom_1b1": ("1065M",),
    "bloom_1b7": ("1722M",),
    "bloom_3b": ("3003M",),
    "bloom_7b1": ("7069M",),
    "bloom_176b": ("176,247M",),
    "mpt_7b": ("6.7B",),
    "mpt_30b": ("29.95B",),
    "grok_1": ("314B",),
    "dbrx": ("132B", "36B"),
    "deepseek_v2": ("236B", "21B"),
    "deepseek_v2_lite": ("15.7B", "2.4B"),
    "deepseek_v3": ("671B", "37B"),
    "deepseek_v3_2": ("671B", "37B"),
    "glm_5": ("744B", "40B"),
    "mimo_v2_flash": ("309B", "15B"),
    "trinity_mini": ("26B",),
    "lfm2_8b_a1b": ("8.3B", "1.5B"),
    "ministral3_8b": ("8.4B",),
    "apertus_8b": ("8B",),
    "nanochat_d32": ("1.9B",),
    "olmo_1b": ("1.18B",),
    "olmo_7b": ("6.9B",),
    "kimi_k2": ("1,040B", "32B"),
    "qwen3_next_80b_a3b": ("80B",),
    "kimi_linear_48b_a3b": ("48B",),
    "gpt_oss_20b": ("20.9B", "3.6B"),
    "gpt_oss_120b": ("116.8B", "5.1B"),
    "glm4_5": ("355B", "32B"),
    "glm4_5_air": ("106B",),
    "qwen1_5_moe_a2_7b": ("14.3B", "2.7B"),
    "qwen2_57b_a14b": ("57.4B", "14B"),
    "dots_llm1": ("142B", "14B"),
    "llama4_scout": ("109B", "17B"),
    "minimax_m2": ("230B", "10B"),
    "granite3_1b_a400m": ("1.3B", "400M"),
    "granite3_3b_a800m": ("3.3B", "800M"),
    "ernie4_5_21b_a3b": ("21B", "3B"),
    "ernie4_5_300b_a47b": ("300B", "47B"),
    "k_exaone_236b_a23b": ("236B", "23B"),
    "hunyuan_a13b": ("80B", "13B"),
    "olmoe_1b_7b": ("6.9B", "1.3B"),
    "glm4_7_flash": ("30B",),
    "mamba_130m": ("130M",),
    "mamba_2_8b": ("2.8B",),
    "mamba2_130m": ("130M",),
    "mamba2_2_7b": ("2.7B",),
    "codestral_mamba_7b": ("7.3B",),
    "falcon_mamba_7b": ("7.27B",),
    "falcon_h1_0_5b": ("0.5B",),
    "jamba_v0_1": ("52B", "12B"),
    "bamba_9b": ("9.78B",),
    "granite4_h_tiny": ("7B",),
    "granite4_h_small": ("32B", "9B"),
    "zamba_7b": ("7B",),
    "zamba2_1_2b": ("1.2B",),
    "nemotron_h_8b": ("8.1B",),
    "nemotron3_nano_30b_a3b": ("31.6B", "3.6B"),
    "lfm2_350m": ("354M",),
    "lfm2_700m": ("742M",),
    "lfm2_1_2b": ("1.2B",),
    "minimax_text_01": ("456B", "45.9B"),
    "ministral_8b": ("8.02B",),
    "stablelm_3b": ("2.80B",),
    "stablelm2_1_6b": ("1.64B",),
    "starcoder2_3b": ("3B",),
    "starcoder2_7b": ("7B",),
    "starcoder2_15b": ("16B",),
    "command_r": ("35B",),
    "aya_23_8b": ("8B",),
    "glm_4_9b": ("9B",),
    "glm4_9b_0414": ("9B",),
    "ernie4_5_0_3b": ("0.36B",),
    "seed_oss_36b": ("36B",),
    "phi4": ("14B",),
    "command_r_plus": ("104B",),
    "command_r7b": ("8B",),
    "smollm3_3b": ("3.08B",),
    "olmo2_1b": ("1.48B",),
    "olmo2_7b": ("7.3B",),
    "olmo2_13b": ("13.7B",),
    "olmo2_32b": ("32.2B",),
    "olmo3_7b": ("7.3B",),
    "olmo3_32b": ("32.2B",),
    "exaone4_1_2b": ("1.28B",),
    "exaone4_32b": ("32.0B",),
    "granite3_2b": ("2.5B",),
    "granite3_8b": ("8.1B",),
    "hunyuan_7b": ("7.5B",),
    "afm_4_5b": ("4.5B",),
    "minitron_4b": ("4.19B",),
    "pythia_160m": ("162M",),
    "pythia_1_4b": ("1.4B",),
    "pythia_6_9b": ("6.9B",),
    "gpt_neox_20b": ("20B",),
    "opt_125m": ("125M",),
    "opt_1_3b": ("1.3B",),
    "opt_6_7b": ("6.7B",),
    "gptj_6b": ("6.05B",),
    "starcoder_15b": ("15.5B",),
    "bert_base": ("110M",),
    "bert_large": ("340M",),
    "t5_small": ("60M",),
    "t5_base": ("220M",),
    "t5_large": ("770M",),
    "t5_3b": ("2.8B",),
    "t5_11b": ("11B",),
    "t5_v1_1_small": ("77M",),
    "t5_v1_1_base": ("250M",),
    "t5_v1_1_large": ("800M",),
    "t5_v1_1_xl": ("3B",),
    "t5_v1_1_xxl": ("11B",),
    "ul2_20b": ("20B",),
    "bart_base": ("140M",),
    "bart_large": ("400M",),
}


def preset(name: str) -> ModelConfig:
    """A preset's model."""
    return load_config(RunConfig, find_asset(f"configs/models/{name}.yaml")).value.model


def family(name: str) -> str:
    """The family of a preset."""
    return FAMILIES[max(filter(name.startswith, FAMILIES), key=len)]


def counts(config: ModelConfig) -> tuple[int, int]:
    """Parameters, and those that are active for one token."""
    flat = flatten_names(
        param_specs(config.build(rules=AxisRules(), dtype=jnp.float32))
    )
    return sum(spec.size for spec in flat.values()), round(
        count_active_parameters(flat, config)
    )


def table() -> str:
    """A row for each preset, in the order of ``PUBLISHED``."""
    rows = ["| preset | family | parameters | active per token | published |"]
    rows.append("|---|---|---:|---:|---|")
    for name, published in PUBLISHED.items():
        total, active = counts(preset(name))
        met = f"{active:,}" if active < total else "all"
        figure = " of which ".join(published)
        rows.append(f"| `{name}` | {family(name)} | {total:,} | {met} | {figure} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"into docs/{PAGE.name}")
    if not parser.parse_args().write:
        print(table(), end="")
        return
    before, rest = PAGE.read_text().split(MARKERS[0])
    _, after = rest.split(MARKERS[1])
    PAGE.write_text(before + MARKERS[0] + table() + MARKERS[1] + after)


if __name__ == "__main__":
    main()
