"""The machine, once: the Stage contract, the only training loop, optimizers, losses and token algebra."""
