"""Kernels for CPUs, in C++, compiled where they run: what XLA's libraries do at a
fraction of the memory's bandwidth, as decoding needs it (docs/performance.md).

Each is a ``cpu.cc`` beside the Python module that calls it through
:func:`jax.ffi.ffi_call`, under the name of its function.
"""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import jax

_FOLDER = Path(__file__).parent
_SOURCES = {
    "CpuMatmul": _FOLDER / "cpu_matmul" / "cpu.cc",
    "PagedAttention": _FOLDER / "paged_attention" / "cpu.cc",
}
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fPIC", "-shared"]


@functools.cache
def load_kernels() -> ctypes.CDLL | None:
    """Registers the kernels with XLA, compiled by $CXX or c++ unless they lie in the
    user's cache; returns their library: None where there is no compiler, or it fails,
    which is warned of."""
    try:
        library = ctypes.CDLL(str(_compile()))
    except (OSError, subprocess.CalledProcessError) as error:
        if not isinstance(error, FileNotFoundError):
            said = getattr(error, "stderr", "") or error
            warnings.warn(
                f"XLA does what kernels for CPUs would do faster: {said}", stacklevel=2
            )
        return None
    for name in _SOURCES:
        handler = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(f"pallas_kernels.{name}", handler, platform="cpu")
    return library


def find_missing_compiler() -> str | None:
    """Returns the name of the C++ compiler that :func:`load_kernels` calls, if it is
    not there."""
    name = _get_compiler()[0]
    return name if shutil.which(name) is None else None


def _get_compiler() -> list[str]:
    """The compiler as a command, with arguments that $CXX may have."""
    return shlex.split(os.environ.get("CXX") or "c++")


def _compile() -> Path:
    """Returns the shared library.

    Raises:
        OSError, subprocess.CalledProcessError: there is no compiler, or it fails.
    """
    command = [*_get_compiler(), *_FLAGS]
    # A home may be shared by machines with other processors.
    cpu = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    features = re.search(r"^(flags|Features)\b.*", cpu, re.MULTILINE)
    texts = [
        path.read_bytes()
        for path in (*sorted(_FOLDER.rglob("*.h")), *_SOURCES.values())
    ]
    made_from = texts, command, features and features[0], jax.__version__
    name = f"{hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]}.so"
    folder = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        / "pallas_kernels"
    )
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own) / name
            command += ["-I", str(_FOLDER.parent), "-isystem", jax.ffi.include_dir()]
            command += [*map(str, _SOURCES.values()), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            made.replace(folder / name)
    return folder / name
