"""Who: the networks. They know weights and shapes, never bits, pages or requests."""
