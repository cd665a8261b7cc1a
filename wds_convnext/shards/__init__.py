"""The format: which shards there are, where their samples stand, and reading them. No torch."""
