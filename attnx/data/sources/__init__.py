"""One file is one dataset: `attnx/data/sources/<name>.py` ends with `DATASET = ...`."""
