"""GPTQ's loss tr(ΔW H ΔWᵀ) on matrices of SmolLM2, beside llm-compressor's.

    python benchmarks/quantization_gptq.py FOLDER TEXT [--layers 0 15] [--tokens 3584]

FOLDER is a Hugging Face checkpoint (benchmarks/smollm2.py makes one), TEXT a file of
English prose. transformers runs it in fp32, and both implementations get the same
matrices and Hessians. It prints losses as parts of round-to-nearest's: llm-compressor's
with min-max scales, ours with the same settings, and ours with the searched scales and
passes that --help names.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from transformers import AutoModelForCausalLM, AutoTokenizer

from maxlm.quantization.algorithms.gptq import GptqConfig, quantize_gptq
from maxlm.quantization.algorithms.hessian import InputHessian, compute_proxy_loss
from maxlm.quantization.algorithms.rounding import fake_quantize
from maxlm.quantization.formats.integer import IntegerFormat

WINDOW = 512
MAPS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def collect_layers(
    folder: Path, text: Path, layers: list[int], tokens: int
) -> dict[str, tuple[np.ndarray, InputHessian]]:
    """Returns matrices and Hessians by the maps' names."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    statistics = {}
    matrices = {}

    def watch(name: str, module: torch.nn.Module) -> None:
        statistics[name] = InputHessian.create(module.in_features)
        matrices[name] = module.weight.detach().numpy()

        def update(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].reshape(-1, module.in_features).numpy()
            statistics[name] = statistics[name].update(jnp.asarray(rows))

        module.register_forward_pre_hook(update)

    for layer in layers:
        for part in MAPS:
            name = f"model.layers.{layer}.{part}"
            watch(name, model.get_submodule(name))
    ids = tokenizer(text.read_text(), return_tensors="pt").input_ids[0, :tokens]
    with torch.no_grad():
        for window in ids.split(WINDOW):
            model(window[None])
    return {name: (matrices[name], statistics[name]) for name in matrices}


def quantize_there(
    weight: np.ndarray, hessian: np.ndarray, rounding: IntegerFormat, act_order: str
) -> np.ndarray:
    """Returns what llm-compressor makes of a matrix."""
    arguments = QuantizationArgs(
        num_bits=rounding.bits,
        type="int",
        strategy="group",
        group_size=rounding.group,
        symmetric=rounding.symmetric,
        actorder=None if act_order == "none" else act_order,
    )
    weights = torch.tensor(weight)
    blocks = weights.reshape(len(weight), -1, rounding.group)
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments)
    stacked = [part[None] for part in (weights, torch.tensor(hessian), scale, zero)]
    values, _, _ = quantize_weight(*stacked, None, arguments)
    return values[0].numpy()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--layers", type=int, nargs="*", default=[0, 15])
    parser.add_argument("--tokens", type=int, default=3584)
    parser.add_argument(
        "--passes", type=int, default=1, help="passes of refinement in the last columns"
    )
    args = parser.parse_args()
    layers = collect_layers(args.folder, args.text, args.layers, args.tokens)
    print("| map | format | order | llm-compressor | same | searched | refined |")
    print("|---|---|---|---|---|---|---|")
    worst = 0.0
    for name, (weight, statistic) in layers.items():
        hessian = np.asarray(statistic.mean)
        for group, is_symmetric in ((32, True), (32, False)):
            rounding = IntegerFormat(4, group, is_symmetric, scale_dtype="float32")
            nearest = fake_quantize(jnp.asarray(weight), rounding)
            unit = float(compute_proxy_loss(weight - nearest, hessian))
            for act_order in ("none", "static"):
                there = quantize_there(weight, hessian, rounding, act_order)
                losses = [float(compute_proxy_loss(weight - there, hessian))]
                ours = "none" if act_order == "none" else "static"
                configs = (
                    GptqConfig(act_order=ours, scales="original", clip_ratios=(1.0,)),
                    GptqConfig(act_order=ours),
                    GptqConfig(act_order="groups", refine_passes=args.passes),
                )
                for config in configs:
                    result = quantize_gptq(
                        jnp.asarray(weight), jnp.asarray(hessian), rounding, config
                    )
                    losses.append(float(result.loss))
                cells = " | ".join(f"{loss / unit:.4f}" for loss in losses)
                print(f"| {name} | {rounding.name} | {act_order} | {cells} |")
                worst = max(worst, losses[-1] / losses[0])
    print(f"refined / llm-compressor, the worst: {worst:.4f}")


if __name__ == "__main__":
    main()
