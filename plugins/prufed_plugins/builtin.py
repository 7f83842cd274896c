"""The built-in methods, announced through the same hooks as anybody's."""
