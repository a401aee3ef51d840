"""Linear encoders on simulated pairs with injected noise: which loss recovers the latent, at which batch."""
