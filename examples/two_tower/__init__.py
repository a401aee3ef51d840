"""Two small towers on emoji and their names: structure losses and the gamma loss, alone and together."""
