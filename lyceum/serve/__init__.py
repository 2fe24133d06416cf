"""People: an API that the official OpenAI client cannot tell from the original, over the engine."""
