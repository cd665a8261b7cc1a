"""Commands that look at shards: verify, inspect, index."""
