"""People who write and judge for the next model: a queue of tasks, message trees, and what came of them."""
