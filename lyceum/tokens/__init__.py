"""Text to ids and back: the tokenizer and the one chat format. No torch in here."""
