"""llama.cpp by way of the package ``llama-cpp-py-sync`` (extra ``parity``): what it
computes from a GGUF file, and the files that it quantizes."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class _Library(NamedTuple):
    """llama.cpp's C functions. Bound at run time, so that their types say nothing."""

    ffi: Any
    functions: Any
    log_callback: Any
    """Kept as long as llama.cpp may call it."""


@cache
def _open_library() -> _Library:
    """Loads the library, which then logs nothing."""
    from llama_cpp_py_sync import _cffi_bindings

    ffi: Any = _cffi_bindings.get_ffi()
    functions: Any = _cffi_bindings.get_lib()

    def stay_silent(level: int, text: object, data: object) -> None:
        """Takes a line of the log."""

    signature = "void(enum ggml_log_level, const char *, void *)"
    log_callback = ffi.callback(signature, stay_silent)
    functions.llama_log_set(log_callback, ffi.NULL)
    functions.llama_backend_init()
    return _Library(ffi, functions, log_callback)


class LlamaCpp:
    """A model in llama.cpp, computed on one CPU thread with keys and values in fp32."""

    def __init__(self, path: Path, max_seq_len: int = 512):
        self._library = _open_library()
        from llama_cpp_py_sync.llama import Llama

        self._llama: Any = Llama(
            str(path), n_ctx=max_seq_len, n_threads=1, type_k="f32", type_v="f32"
        )

    def tokenize(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Returns a text's ids, without bos."""
        return self._llama.tokenize(
            text, add_special=False, parse_special=parse_special
        )

    def compute_logits(self, ids: Sequence[int]) -> np.ndarray:
        """Returns the logits after the last id, fp32 [V]."""
        self._llama._clear_context_state()
        self._llama._eval_tokens([int(i) for i in ids], 0)
        return self._read_logits()

    def generate(self, ids: Sequence[int], num_tokens: int) -> list[int]:
        """Returns the likeliest continuation of ids, whatever it ends at."""
        self._llama._clear_context_state()
        position = self._llama._eval_tokens([int(i) for i in ids], 0)
        drawn: list[int] = []
        while len(drawn) < num_tokens:
            token = int(self._read_logits().argmax())
            drawn.append(token)
            position = self._llama._eval_tokens([token], position)
        return drawn

    def _read_logits(self) -> np.ndarray:
        ffi, functions, _ = self._library
        count = functions.llama_vocab_n_tokens(self._llama._vocab)
        logits = functions.llama_get_logits_ith(self._llama._ctx, -1)
        return np.frombuffer(ffi.buffer(logits, 4 * count), np.float32).copy()


def quantize_with_llama_cpp(source: Path, target: Path, file_type: int) -> None:
    """Writes llama.cpp's own quantization of a GGUF file; ``file_type``: a member of
    gguf.LlamaFileType."""
    ffi, functions, _ = _open_library()
    params = functions.llama_model_quantize_default_params()
    params.ftype = int(file_type)
    params.nthread = 1
    params.allow_requantize = True
    pointer = ffi.new("llama_model_quantize_params *", params)
    code = functions.llama_model_quantize(
        str(source).encode(), str(target).encode(), pointer
    )
    if code != 0:
        raise RuntimeError(f"llama_model_quantize returned {code}")
