"""A run: rounds of tuning and merging, journalled so that it can be resumed."""
