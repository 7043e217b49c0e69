import pytest

from maxlm.huggingface import arrays


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(arrays, "TILE_BYTES", 64)
    monkeypatch.setattr(arrays, "FILE_BYTES", 200)
