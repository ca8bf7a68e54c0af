import os

import pytest
import torch

import demo_checkpoint

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers, which the tests compare with, is to look at files only


@pytest.fixture(scope="session")
def demo():
    """The demo checkpoint's folder."""
    folder = demo_checkpoint.FOLDER
    if not (folder / "config.json").exists():
        pytest.fail(f"{folder} is missing: `make test` sets it up")
    return folder


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
