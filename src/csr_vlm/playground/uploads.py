"""Give Gradio a folder of its own for uploads; imported before Gradio, which reads its name once."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path


def upload_folder() -> Path:
    """Create the folder that Gradio keeps uploads and copies in, readable by this user only and deleted at the end."""
    folder = Path(tempfile.mkdtemp(prefix="csr-try-")).resolve()
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
