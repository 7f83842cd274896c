"""Methods that merge the clients' adapters into the global one: one method, one file."""
