"""Methods that train a client's adapter."""
