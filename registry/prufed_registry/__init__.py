"""The ground floor: immutable, versioned model artifacts as plain files."""
