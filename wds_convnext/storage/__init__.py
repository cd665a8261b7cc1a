"""Objects of remote stores as local files. It knows nothing of samples, and imports no torch."""
