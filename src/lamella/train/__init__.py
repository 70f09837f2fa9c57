"""Training: a recipe becomes torchtitan's Trainer with our model, data, balancing and metrics."""
