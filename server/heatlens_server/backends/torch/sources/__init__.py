"""Where networks come from: sources, weights, layers that can be explained."""
