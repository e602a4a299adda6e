"""Several processes: their group, engines, shares of the weights, locks and signals."""
