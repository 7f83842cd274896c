"""Methods that turn the aggregate into a step of the global adapter: one method, one file."""
