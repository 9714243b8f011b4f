"""Nothing is looked up on the net: weights come out of packages. Processes that a whole test file shares."""

import os

import pytest
from ranks import Ranks

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.close()
