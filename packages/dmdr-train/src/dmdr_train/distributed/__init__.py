"""Everything that several processes need: their group, engines, sharded weights, locks and signals."""
