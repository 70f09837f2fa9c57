"""lamella: dense Llama checkpoints into fine-grained mixtures of experts. `lamella --help` starts here."""

from lamella.api import convert, generate, load

__all__ = ["Client", "convert", "generate", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`lamella.Client`, imported when somebody asks for it."""
    if name == "Client":
        from lamella.service.client import Client

        return Client
    raise AttributeError(f"module 'lamella' has no attribute {name!r}")
