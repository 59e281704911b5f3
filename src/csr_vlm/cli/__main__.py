"""``python -m csr_vlm.cli`` is ``csr``."""

from csr_vlm.cli import main

main()
