"""Hold one loaded model with several adapters, and switch between them without loading anything again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from peft import PeftModel

from csr_vlm.config.schema import ModelConfig
from csr_vlm.models.encoding import MAX_IMAGE_PIXELS
from csr_vlm.models.loading import load_adapter, load_base
from csr_vlm.models.policy import Policy


class AdapterSwitch:
    """Offer several policies that share the weights of one base model.

    Args:
        config: The base model.
        adapters: Directory of each policy's adapter by the name of the policy; None for the base model itself.
        max_image_pixels: Larger images are rejected without decoding.

    Raises:
        CsrError: The model or an adapter cannot be loaded, or an adapter does not fit the model.
    """

    def __init__(
        self, config: ModelConfig, adapters: Mapping[str, Path | None], max_image_pixels: int = MAX_IMAGE_PIXELS
    ) -> None:
        model, processor = load_base(config)
        self._names: dict[str, str | None] = {}
        """PEFT's name of each policy's adapter; it allows fewer characters than the name of a policy."""
        for index, (policy, adapter) in enumerate(adapters.items()):
            self._names[policy] = None if adapter is None else f"adapter{index}"
            if adapter is not None:
                model = load_adapter(model, adapter, name=f"adapter{index}").eval()
        self._policy = Policy(model, processor, max_image_pixels)
        self._lock = Lock()  # a server may leave the context in another thread than it was entered in

    @contextmanager
    def using(self, policy: str) -> Iterator[Policy]:
        """Switch to a policy while the context is open; other threads wait meanwhile."""
        adapter = self._names[policy]
        with self._lock:
            model = self._policy.model
            if not isinstance(model, PeftModel):
                yield self._policy
            elif adapter is None:
                with model.disable_adapter():
                    yield self._policy
            else:
                model.set_adapter(adapter)
                yield self._policy
