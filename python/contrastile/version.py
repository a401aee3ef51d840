"""The release, where code that the package imports can read it."""

__version__ = "0.1.0"
