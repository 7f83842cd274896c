"""Who trains in a round. One method, one file."""
