"""Ids to tensors: token shards, rows, ranking batches, the stream."""
