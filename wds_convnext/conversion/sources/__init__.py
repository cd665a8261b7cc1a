"""The kinds of sources that a conversion reads, a file or a few each."""
