"""The policy: loading, group packing, log-probabilities, losses."""
