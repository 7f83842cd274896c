"""The middle floor: what methods do. Pure computation; no registry, no CLI, no printing."""
