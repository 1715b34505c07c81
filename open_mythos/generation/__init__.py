"""Text generation: sampling rules and the loop around the model."""
