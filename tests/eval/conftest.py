"""Where lmms-eval is absent there is nothing to test: it has an environment of its own (make test-eval)."""

from __future__ import annotations

import sys
import types
from importlib import util

# torchvision as it is published is built for CUDA and does not import beside a CPU torch;
# lmms-eval imports it, and nothing here uses it.
if util.find_spec("lmms_eval") is not None and util.find_spec("torchvision") is not None:
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
