"""The version, read from here by code that must not import importlib.metadata."""

__version__ = "0.1.0"
