"""The top floor: what a person does, on the command line and from Python."""

__version__ = "0.1.0"
