"""Common setup of all tests: no hub, one seed, the demo model, and @gpu tests skipped without a GPU."""

import os
from pathlib import Path

import pytest

# Before anything imports huggingface_hub, which reads them once: a test that reaches for a hub is a broken test.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what is marked gpu where torch sees none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Directory of the demo model, for tests marked demo. Skips where it cannot be fetched, but not in CI."""
    # Here, not above: the kernels' tests then run with torch and pytest alone.
    from lowbit.errors import CheckpointError
    from lowbit.models.demo import demo_model_dir

    try:
        return demo_model_dir()
    except CheckpointError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no demo model: {error}")
