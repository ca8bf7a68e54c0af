import os

import pytest
import torch

import demo_checkpoint

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers, which the tests compare with, is to look at files only


@pytest.fixture(scope="session")
def demo():
    """The demo checkpoint's folder, written first if need be."""
    if demo_checkpoint.main([]) != 0:
        pytest.fail("there is no demo checkpoint and it cannot be written: `make test` sets it up")
    return demo_checkpoint.FOLDER


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
