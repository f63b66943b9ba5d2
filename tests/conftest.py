"""Fixtures that several test files share."""

import os
import signal

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are imported

from kernels import native


@pytest.fixture(scope="module")
def one_thread():
    """On busy cores, tiny operators wait for each other's threads twenty times longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def without_native(monkeypatch, tmp_path):
    """A compiler that fails, and nothing that was built before."""
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr(native, "_building", None)
    monkeypatch.setattr(native, "_loaded", False)


# A shell that starts the tests in the background lets them, and all they start, ignore Ctrl-C; the tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)
