import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores; more threads would only wait for them


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory, monkeypatch):
    """Indexes of tars in read-only folders go to a cache dir; a test must not find another run's."""
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path_factory.mktemp("cache")))
