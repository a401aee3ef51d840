"""What the compiled Triton kernels are made of, and the bound that this sets: no GPU is needed."""
