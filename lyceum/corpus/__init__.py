"""What we read: records, sources, filters, duplicates, mixtures and the corpus pipeline. Imports no torch."""
