"""Bias and variance of minibatch gradients of a frozen model, against the exact gradient over all pairs."""
