"""Tiny models of every family, made once, and a cache that no test shares with the user."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.builders import make_model, save
from tests.e2e.cli import run_quantize

ModelOf = Callable[[str], tuple[torch.nn.Module, Path]]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelOf:
    """family -> (the model in transformers' memory, its directory)."""
    made: dict[str, tuple[torch.nn.Module, Path]] = {}

    def model_of(family: str) -> tuple[torch.nn.Module, Path]:
        if family not in made:
            model = make_model(family)
            made[family] = model, save(model, tmp_path_factory.mktemp(family) / "model")
        return made[family]

    return model_of


@pytest.fixture(scope="session")
def int4(models: ModelOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama rounded to 4 bits, its perplexity and divergence measured."""
    output = tmp_path_factory.mktemp("int4") / "llama-int4"
    args = ("--method", "rtn", "--group-size", 32, "--eval", "ppl,kl", "--eval-windows", 2, "-o", output)
    done = run_quantize(models("llama")[1], *args)
    assert done.code == 0, done.err
    return output


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own."""
    directory = tmp_path / "lowbit-cache"
    monkeypatch.setattr("lowbit.api.session.cache_dir", lambda: directory)
    return directory
