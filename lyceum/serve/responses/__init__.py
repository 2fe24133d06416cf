"""The responses API: a conversation as items, kept by the server where the client wants it, over the chat."""
