"""Common setup of all tests: no hub, one seed, the demo model, and @gpu tests skipped without a GPU."""

import os
from pathlib import Path

import pytest

# Must be set before anything imports huggingface_hub, which reads them once: no test may reach a real hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked gpu if torch sees no GPU."""
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
    """Directory of the demo model, for tests marked demo. Skips if it cannot be fetched, except in CI."""
    # Imported here, so that the kernels' tests run with only torch and pytest.
    from lowbit.errors import CheckpointError
    from lowbit.models.demo import demo_model_dir

    try:
        return demo_model_dir()
    except CheckpointError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no demo model: {error}")
