"""Is all there that optional tests ask for, so that none is left out in silence?  pytest tests/repository/test_extras.py"""

import re
from importlib.metadata import PackageNotFoundError, requires, version

import pytest


def extra(name: str) -> list[str]:
    """The distributions of an extra, as the package was installed."""
    wanted = [text for text in requires("esr_kernels") if re.search(rf"extra == ['\"]{name}['\"]", text)]
    return [re.split(r"[\s\[><=;]", text)[0] for text in wanted]


def missing(names: list[str]) -> list[str]:
    found = []
    for name in names:
        try:
            version(name)
        except PackageNotFoundError:
            found.append(name)
    return found


def test_the_extra_test_is_installed():
    """Tests of optional features are skipped without their package; here is said that it was to be there."""
    names = extra("test")
    assert {"peft", "gguf", "accelerate", "pyarrow", "datasets", "math-verify", "trl"} <= set(names)
    assert missing(names) == []


def test_what_is_not_installed_is_found():
    assert missing(["pytest", "a-package-that-nobody-has"]) == ["a-package-that-nobody-has"]


@pytest.mark.parametrize("name", ["lora", "data", "math", "gguf"])
def test_an_extra_of_a_feature_is_part_of_the_extra_test(name):
    assert set(extra(name)) <= set(extra("test"))
