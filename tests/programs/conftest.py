"""Compiles what several runs of one process have in common once."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="session")
def _compilation_cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture
def compiled_once(_compilation_cache) -> Iterator[None]:
    """JAX's compilation cache, on disk, for tests that train in this process."""
    from jax.experimental.compilation_cache import compilation_cache

    settings = {
        "jax_compilation_cache_dir": _compilation_cache,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    compilation_cache.reset_cache()
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
