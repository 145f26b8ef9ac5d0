"""The environment, read in one place."""

import pytest

from trimaran.core.env import Environment, read_environment
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
