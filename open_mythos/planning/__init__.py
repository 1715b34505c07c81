"""What training a model takes on GPUs that need not be there: memory, traffic, time, and the layout that is fastest."""
