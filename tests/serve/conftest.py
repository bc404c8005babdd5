"""The real engine and model of the tests that need them.

`NIGHTSCHOOL_ENGINE_PYTHON` names another engine environment than `.engine`, `NIGHTSCHOOL_TEST_MODEL` a model
folder; without it the default model is prepared, in the user's cache so that it happens once.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from httpx._config import DEFAULT_TIMEOUT_CONFIG

from serve.engine import ROOT
from serve.models import DEFAULT_MODEL, ensure_model

PYTHON = Path(os.environ.get("NIGHTSCHOOL_ENGINE_PYTHON") or ROOT / ".engine" / "bin" / "python")
NO_ENGINE = pytest.mark.skipif(not PYTHON.exists(), reason=f"there is no engine at {PYTHON}: run `make setup`")
needs_engine = [pytest.mark.engine, NO_ENGINE]


# httpx gives up after 5 s, which a disk or processor that others use as well can take.
DEFAULT_TIMEOUT_CONFIG.connect = DEFAULT_TIMEOUT_CONFIG.read = DEFAULT_TIMEOUT_CONFIG.write = 60.0


@pytest.fixture(scope="session")
def model() -> Path:
    given = os.environ.get("NIGHTSCHOOL_TEST_MODEL")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nightschool" / "models"
    return ensure_model(given or DEFAULT_MODEL, cache, print)
