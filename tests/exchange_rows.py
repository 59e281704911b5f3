"""Hold one preference pair in the form of every other program and dataset that is read.

Each says that "A boat." is preferred to "A fish." for the question "What is it?" about the image a.png beside the file.
"""

from __future__ import annotations

import json
from typing import Any

_USER = {"role": "user", "content": "<image>What is it?"}
_GOOD, _BAD = ({"role": "assistant", "content": text} for text in ("A boat.", "A fish."))
_TALK = [{"from": "human", "value": "<image>What is it?"}]
_SIDES = {"chosen": "A boat.", "rejected": "A fish."}
OTHERS: dict[str, dict[str, Any]] = {
    "LLaMA-Factory sharegpt": {
        "conversations": _TALK,
        "chosen": {"from": "gpt", "value": "A boat."},
        "rejected": {"from": "gpt", "value": "A fish."},
        "images": ["a.png"],
    },
    "LLaMA-Factory alpaca": {"instruction": "<image>What is it?", "input": "", **_SIDES, "images": ["a.png"]},
    "ms-swift": {"messages": [_USER, _GOOD], "images": ["a.png"], "rejected_response": "A fish."},
    "ms-swift list": {"messages": [_USER, _GOOD], "images": ["a.png"], "rejected_response": [_BAD]},
    "ms-swift texts": {"messages": [_USER, _GOOD], "images": ["a.png"], "rejected_response": ["A fish."]},
    "ms-swift rejected_messages": {"messages": [_USER, _GOOD], "images": ["a.png"], "rejected_messages": [_USER, _BAD]},
    "ms-swift 2": {"query": "What is it?", "response": "A boat.", "images": ["a.png"], "rejected_response": "A fish."},
    "ms-swift JSON": {"messages": json.dumps([_USER, _GOOD]), "images": '["a.png"]', "rejected_response": "A fish."},
    "TRL JSON": {"images": ["a.png"], "chosen": json.dumps([_USER, _GOOD]), "rejected": json.dumps([_USER, _BAD])},
    "TRL": {"images": ["a.png"], "prompt": [_USER], "chosen": [_GOOD], "rejected": [_BAD]},
    "TRL implicit": {"images": ["a.png"], "chosen": [_USER, _GOOD], "rejected": [_USER, _BAD]},
    "TRL texts": {"images": ["a.png"], "prompt": "What is it?", **_SIDES},
    "RLHF-V": {"image": {"path": "a.png"}, "text": json.dumps({"question": "What is it?", **_SIDES}), "ds_name": "x"},
    "MMPR": {"image": "a.png", "question": "<image>\nWhat is it?", **_SIDES},
    "POVID": {
        "image": "a.png",
        "conversations": [*_TALK, {"from": "gpt", "value": "A boat."}],
        "rejected_conversations": [*_TALK, {"from": "gpt", "value": "A fish."}],
    },
    "HA-DPO question": {
        "image_id": "a",
        "image": "a.png",
        "question": "What is it?",
        "chosen": "A boat.",
        "reject": "A fish.",
    },
}

OTHERS_OF_THEIR_OWN: dict[str, dict[str, Any]] = {
    "SENTINEL": {
        "image_id": 0,
        "image_path": "a.png",
        "question": "What is it?",
        "context": "A tree.",
        "y_win": " A boat.",
        "y_lose": " A fish.",
    },
    "HA-DPO description": {"image_id": 7, "chosen": ["A boat.", "A red boat."], "rejected": ["A fish."]},
}
"""Forms in which a pair says something else: SENTINEL's responses go on, HA-DPO's descriptions have no question."""
