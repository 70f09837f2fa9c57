"""lamella: dense Llama checkpoints into fine-grained mixtures of experts. `lamella --help` starts here."""

from lamella.api import convert, load

__all__ = ["convert", "load"]
__version__ = "0.1.0"
