"""The list of what a W&B server makes different is of tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from differences import ON_WANDB


@pytest.mark.parametrize("module", sorted(ON_WANDB))
def test_every_name_is_one_of_a_test(module: str) -> None:
    found = set(re.findall(r"^def (test_\w+)", (Path(__file__).parent / f"{module}.py").read_text(), re.MULTILINE))
    assert set(ON_WANDB[module]) < found, "the list names what is not there"
