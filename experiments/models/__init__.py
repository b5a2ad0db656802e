"""Networks of the literature, in Flax Linen."""
