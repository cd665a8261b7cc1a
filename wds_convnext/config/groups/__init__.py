"""The options of a training run, a dataclass for each group of its help."""
