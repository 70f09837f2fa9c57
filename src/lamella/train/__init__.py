"""Training: a recipe becomes torchtitan's Trainer with our model, data, balancing and metrics."""

import lamella.titan  # noqa: F401  before anything here imports torchtitan, which asks for the device at import
