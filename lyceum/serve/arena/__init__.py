"""The arena: two hidden models answer the same prompt, a person says which is better, and then learns which they were."""
