"""Fixtures of the tests of the engine."""

from tests.cached_tracing import cached_tracing as cached_tracing
