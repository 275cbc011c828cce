"""Artifacts as mounted directories: versioned datasets and models, read lazily and checked, written by unmounting."""

__version__ = "0.1.0"
