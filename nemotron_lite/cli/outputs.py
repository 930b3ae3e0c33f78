"""How commands write a model that took minutes or hours to make.

A command tries its output folder before it begins to work (`check_writable_folder`). If the folder
cannot be written any more when the model is finished, the model is saved to a temporary folder.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemotron_lite.model import Nemotron


def save_model(model: Nemotron, folder: Path) -> None:
    """Save a model; to a temporary folder if `folder` cannot be written any more.

    Raises:
        OSError: `folder` cannot be written; the text says where the model is instead.
    """
    from nemotron_lite.checkpoint import save

    try:
        save(model, folder)
    except Exception as error:
        instead = Path(tempfile.mkdtemp(prefix="nemotron-lite-"), "model")
        try:
            save(model, instead)
        except Exception as second:
            raise OSError(
                f"the model cannot be saved to {folder} ({error}) nor to {instead} ({second})."
            ) from error
        raise OSError(
            f"the model cannot be saved to {folder} ({error}). It is in {instead} instead: move it "
            "to where you want it."
        ) from error
