"""One short file per command; each is also a Python function with a configuration dataclass."""
