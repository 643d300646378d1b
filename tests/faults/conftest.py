"""One ground for all fault tests: the fork server starts once."""

from __future__ import annotations

import pytest

from tests.faults.events import Ground


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("faults"))
