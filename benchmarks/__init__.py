"""Baselines, evaluators and timings. Not part of the installed package."""
