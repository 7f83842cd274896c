"""The built-in pruners: one method, one file."""
