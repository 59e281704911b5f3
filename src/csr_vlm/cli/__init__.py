"""Provide the command line ``csr VERB``. Data goes to stdout, everything else to stderr."""

from csr_vlm.cli.app import main

__all__ = ["main"]
