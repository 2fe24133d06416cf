"""How good is it: measures, benchmarks, tables and the report of a run."""
