"""Every method that takes steps, by name."""

from collections.abc import Mapping
from types import MappingProxyType

from heatlens_server.cam.catalog import Method
from heatlens_server.engines.steps.job import Stepper

STEPPERS: Mapping[Method, Stepper] = MappingProxyType({})
"""The methods of many runs."""
