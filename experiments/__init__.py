"""Experiments: one absl script per claim. Run them from a clone, as `python -m experiments.NAME --help`."""
