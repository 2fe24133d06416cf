"""Files that clients send, and those that are made for them: kept on disk, known to the store, each its owner's."""
