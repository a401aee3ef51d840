"""Both sweeps for backends whose kernels work tile by tile: windows, strips and sums, whoever launches."""
