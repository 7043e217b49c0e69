"""Compiles the kernels in C++ and registers them with XLA.

Each kernel is a ``.cc`` file beside the Python module that calls it through
:func:`jax.ffi.ffi_call`; :data:`HANDLERS` has their names.
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

MATMUL = "maxlm.CpuMatmul"
PAGED_ATTENTION = "maxlm.CpuPagedAttention"
HANDLERS = {MATMUL: "CpuMatmul", PAGED_ATTENTION: "CpuPagedAttention"}
"""XLA's name of each kernel → its symbol in the library."""

_FOLDER = Path(__file__).parent
_SOURCES = [_FOLDER / "matmul.cc", _FOLDER / "paged_attention.cc"]
_HEADERS = [_FOLDER / "vectors.h"]
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fPIC", "-shared"]


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """Returns the kernels' library after registering them with XLA: from the user's
    cache, or compiled by $CXX or c++. None where there is no compiler, or it fails,
    which is warned of."""
    try:
        library = ctypes.CDLL(str(_compile()))
    except FileNotFoundError:
        # No compiler: `find_missing_compiler` is there for those who want to say so.
        return None
    except subprocess.CalledProcessError as error:
        _warn(error.stderr or str(error))
        return None
    except OSError as error:
        _warn(str(error))
        return None
    for name, symbol in HANDLERS.items():
        handler = jax.ffi.pycapsule(getattr(library, symbol))
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return library


def find_missing_compiler() -> str | None:
    """Returns the name of the C++ compiler that :func:`load_library` calls, if it is
    not there."""
    name = _get_compiler()[0]
    return name if shutil.which(name) is None else None


def _warn(reason: str) -> None:
    warnings.warn(
        f"XLA does what kernels for CPUs would do faster: {reason}", stacklevel=3
    )


def _get_compiler() -> list[str]:
    """The compiler as a command, with arguments that $CXX may have."""
    return shlex.split(os.environ.get("CXX") or "c++")


def _compile() -> Path:
    """Returns the shared library, compiled unless it lies in the cache.

    Raises:
        OSError, subprocess.CalledProcessError: there is no compiler, or it fails.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "maxlm" / "cpu_kernels"
    command = [*_get_compiler(), *_FLAGS]
    library = folder / f"{_fingerprint(command)}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    # Compiled aside and renamed: processes that start together never load half a file.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        compiled = Path(scratch) / library.name
        command += ["-isystem", jax.ffi.include_dir()]
        command += [str(source) for source in _SOURCES]
        command += ["-o", str(compiled)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        compiled.replace(library)
    return library


def _fingerprint(command: list[str]) -> str:
    """A hash of all that the library depends on."""
    texts = [path.read_bytes() for path in (*_HEADERS, *_SOURCES)]
    # -march=native, and a home may be shared by machines with other processors.
    cpu = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    features = re.search(r"^(flags|Features)\b.*", cpu, re.MULTILINE)
    # The headers of XLA's foreign function interface come with JAX.
    parts = texts, command, features and features[0], jax.__version__
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
