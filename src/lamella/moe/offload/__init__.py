"""Experts that are not all in memory: where they wait, the cache of those that are here, and the layers that ask."""
