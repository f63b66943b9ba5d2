"""Fixtures that several test files share."""

import signal

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """On busy cores, tiny operators wait for each other's threads twenty times longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# A shell that starts the tests in the background lets them, and all they start, ignore Ctrl-C; the tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)
