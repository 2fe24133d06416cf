"""Batches: requests from a file, answered when nobody is kept waiting by it, into files."""
