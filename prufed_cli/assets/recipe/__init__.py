"""How the embedded model and its text are made."""
