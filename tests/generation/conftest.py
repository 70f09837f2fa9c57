"""What the tests of generation start from: a dense model that chats, and twins made of it that are in use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lamella
from lamella.conversion import SliceOptions, convert
from support.models import save_llama

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_llama(tmp_path_factory.mktemp("dense") / "model", std=0.4)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def moe(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twins that differ from their slices, and routers that send tokens to both."""
    folder = tmp_path_factory.mktemp("moe") / "model"
    convert(dense, folder, SliceOptions(slices=4, noise=0.5))
    model, _ = lamella.load(folder)
    torch.manual_seed(0)
    for layer in model.moe_layers:
        torch.nn.init.normal_(layer.router.weight)
        layer.router.selection_bias.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder
