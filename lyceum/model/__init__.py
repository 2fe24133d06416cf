"""Tensors to hidden states to logits: the decoder, its heads and the folder it is saved in."""
