"""Train image classifiers from WebDataset tar shards: exact order, flat memory, resumable."""

__version__ = "0.1.0"
