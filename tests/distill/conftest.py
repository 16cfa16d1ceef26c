"""A stub of a vLLM server and a student, for the tests of the backend that draws with one."""

import pytest
from tiny_models import make_model
from vllm_stub import VllmStub


@pytest.fixture
def stub():
    stub = VllmStub()
    yield stub
    stub.stop()


@pytest.fixture
def student():
    return make_model(3)
