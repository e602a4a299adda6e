"""Drawing pictures: the sampler, the grid of pictures, and the two ways in which `dmdr-generate` draws."""
