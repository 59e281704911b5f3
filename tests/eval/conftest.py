"""Prepare the tests of lmms-eval, which run in a separate environment (make test-eval)."""

from __future__ import annotations

import sys
import types
from importlib import util

# The published torchvision is built for CUDA and cannot be imported with a CPU build of torch.
# lmms-eval imports it, but these tests do not use it.
if util.find_spec("lmms_eval") is not None and util.find_spec("torchvision") is not None:
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
