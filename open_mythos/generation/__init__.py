"""Text generation: sampling, engines that compute tokens, and the decoding loops around the model."""
