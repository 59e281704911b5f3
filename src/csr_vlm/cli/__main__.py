"""Run ``csr`` as ``python -m csr_vlm.cli``."""

from csr_vlm.cli import main

main()
