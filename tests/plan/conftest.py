"""The config.json of Llama 3 8B."""

from __future__ import annotations

import json

import pytest

from support.planning import LLAMA3_8B


@pytest.fixture
def llama3(tmp_path):
    path = tmp_path / "llama3.json"
    path.write_text(json.dumps(LLAMA3_8B | {"max_position_embeddings": 32768}))
    return path
