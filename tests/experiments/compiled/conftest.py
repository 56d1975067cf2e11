"""Devices that are not there, for tests of programs that are compiled for them."""

import pytest

from experiments.compiled import targets
from experiments.compiled.targets import CompileTarget


@pytest.fixture
def target(request) -> CompileTarget:
    extra = targets.missing_wheel(request.param)
    if extra is not None:
        pytest.skip(f"needs the extra {extra}")
    return CompileTarget.parse(request.param)
