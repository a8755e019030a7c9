"""Measures of how faithful a map is, as pure generators, of torch's arrays or numpy's."""
