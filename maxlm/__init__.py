"""maxlm: from raw text to a trained, aligned and served language model, in one JAX
codebase."""

__version__ = "0.1.0"
