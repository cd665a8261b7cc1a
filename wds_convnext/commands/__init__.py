"""The commands: each builds its config, calls one function and prints the result.

torch and pyarrow are imported inside the commands, so that --help is instant.
"""
