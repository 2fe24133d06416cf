"""Ids to more ids: sequences, key/value memory, scheduler, sampler, engine and session."""
