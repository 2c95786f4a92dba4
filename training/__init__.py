"""One short script per experiment, run as ``python -m training.NAME``."""
