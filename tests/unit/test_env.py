"""The environment, read in one place."""

import re
from pathlib import Path

import pytest

import trimaran
from trimaran.core.env import VARIABLES, Environment, read_environment
from trimaran.core.errors import ConfigError


def test_an_empty_environment_says_nothing():
    assert read_environment({}) == Environment()
    assert read_environment({"TRIMARAN_API_KEY": " ,", "TRIMARAN_LOG_LEVEL": ""}) == Environment()


def test_values_are_typed():
    values = {
        "TRIMARAN_API_KEY": "one, two,",
        "TRIMARAN_LOG_LEVEL": "Debug",
    }
    assert read_environment(values) == Environment(("one", "two"), "debug")


def test_a_wrong_value_names_its_variable():
    with pytest.raises(ConfigError, match="TRIMARAN_LOG_LEVEL"):
        read_environment({"TRIMARAN_LOG_LEVEL": "loud"})


def test_every_variable_that_the_package_names_is_listed():
    package = Path(trimaran.__file__).parent
    folders = ("cli", "conformance", "core", "kernels_cpu", "kernels_cuda", "platforms", "server")
    sources = [path for folder in folders for path in (package / folder).rglob("*.py")]
    named = {
        name
        for path in sources
        for name in re.findall(r'"(TRIMARAN_[A-Z_]+)"', path.read_text(encoding="utf-8"))
    }
    assert named == set(VARIABLES)
    assert len(named) <= 10
