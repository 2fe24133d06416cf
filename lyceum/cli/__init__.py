"""The command line: one verb per step, each importing its package on demand."""
