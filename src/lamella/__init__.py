"""lamella: dense Llama checkpoints into fine-grained mixtures of experts. `lamella --help` starts here."""

__version__ = "0.1.0"
