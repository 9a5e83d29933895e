"""Several processes: starting what was asked for, holding the weights, watching each other, stopping together."""
