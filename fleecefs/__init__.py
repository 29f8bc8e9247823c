"""Live disk images and their past, as files."""

__version__ = "0.1.0"
