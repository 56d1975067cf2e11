"""What is refused before any weight is drawn or read."""

from __future__ import annotations

import pytest

from models.load import load_model


@pytest.mark.parametrize("weights", ["random", "trained", "a-folder-that-is-not-there"])
def test_a_model_that_is_not_dense_is_refused_by_name(weights: str) -> None:
    message = r"model: expected a dense one \(no mixture .*\), got gpt-oss-120b"
    with pytest.raises(ValueError, match=message):
        load_model("gpt-oss-120b", weights)
