"""Write checkouts in the layouts of the hallucination benchmarks, and serve a judge.

The files follow the public descriptions of the formats; questions, prompts and scripts are our own and tiny.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

Reply = tuple[int, Mapping[str, str], bytes]
"""Status, headers and body."""


def completion(text: str | None, model: str = "judge-2026-01-01") -> Reply:
    """Return what an OpenAI-compatible endpoint replies."""
    body = {"model": model, "choices": [{"message": {"role": "assistant", "content": text}}], "usage": {}}
    return 200, {}, json.dumps(body).encode()


@contextmanager
def judge_server(reply: Callable[[dict[str, Any]], Reply]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serve a judge on this machine; yields its address and the requests that it got, with their headers."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({"path": self.path, "headers": dict(self.headers), **body})
            status, headers, content = reply(body)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), "white").save(path)
    return path


def write_hallusion(folder: Path) -> Path:
    """Write HallusionBench: two figures of one question text, one figure with two texts, one question without image."""
    rows = [
        ("VD", "illusion", "1", "0", "0", "0", "Is A as big as B?", "1"),
        ("VD", "illusion", "2", "0", "1", "0", "Is A as big as B?", "0"),
        ("VD", "illusion", "2", "0", "1", "1", "Is B bigger than A?", "1"),
        ("VS", "chart", "0", "0", "0", "0", "Is Rome in Italy?", "1"),
        ("VS", "chart", "1", "0", "1", "0", "Is Rome in Italy?", "1"),
    ]
    names = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id", "question", "gt_answer")
    found = []
    for row in rows:
        values = dict(zip(names, row, strict=True))
        name = f"./hallusion_bench/{row[0]}/{row[1]}/{row[3]}_{row[4]}.png"
        if row[2] != "0":
            picture(folder / name)
        found.append({**values, "filename": None if row[2] == "0" else name, "gt_answer_details": ""})
    (folder / "HallusionBench.json").write_text(json.dumps(found))
    return folder


MMHAL_SCRIPT = '''
import nothing_that_exists
template = """Rate this.
Contents: {}
Question: {}
Standard: {}
Answer: {}
"""
raise SystemExit("never run")
'''


def write_mmhal(folder: Path) -> Path:
    """Write MMHal-Bench: three questions of two types."""
    rows = []
    for number, kind in enumerate(["attribute", "counting", "attribute"]):
        picture(folder / "images" / f"photo{number}_o.jpg")
        rows.append(
            {
                "question_type": kind,
                "question_topic": "outdoor",
                "image_id": f"id{number}",
                "image_src": f"https://example.org/8/photo{number}_o.jpg",
                "image_content": ["Boat", "Fish"],
                "question": f"What is here {number}?",
                "gt_answer": "A {boat}.",
                "model_answer": "",
            }
        )
    (folder / "response_template.json").write_text(json.dumps(rows))
    (folder / "eval_gpt4.py").write_text(MMHAL_SCRIPT)
    return folder


OBJECTHAL_SCRIPT = '''
import nothing_that_exists
prompt_template = """List the objects.
Question: {question}
Answer: {answer}
"""
'''


def write_objecthal(folder: Path, questions: Mapping[int, bytes], synonyms: str) -> Path:
    """Write Object HalBench in the layout of RLAIF-V: image ids of COCO with their pictures."""
    data = folder / "eval" / "data"
    data.mkdir(parents=True)
    rows = [
        {"image": base64.b64encode(content).decode(), "question": "Describe this image in detail.", "image_id": key}
        for key, content in questions.items()
    ]
    (data / "obj_halbench_300_with_image.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "synonyms_refine.txt").write_text(synonyms)
    (folder / "eval" / "eval_gpt_obj_halbench.py").write_text(OBJECTHAL_SCRIPT)
    return folder


AMBER_SCRIPT = """
import argparse, json, os, sys

parser = argparse.ArgumentParser()
parser.add_argument("--inference_data")
parser.add_argument("--evaluation_type", choices=["a", "g", "d"])
args = parser.parse_args()
if os.environ.get("JUDGE_API_KEY"):
    sys.exit("a secret reached the script")
truth = {row["id"]: row for row in json.load(open("data/annotations.json"))}
answers = json.load(open(args.inference_data))
yes_no = [row for row in answers if truth[row["id"]]["type"] != "generative"]
described = [row for row in answers if truth[row["id"]]["type"] == "generative"]
right = sum(row["response"] == truth[row["id"]]["truth"].capitalize() for row in yes_no)
no = [row for row in yes_no if row["response"] == "No"]
true_no = sum(truth[row["id"]]["truth"] == "no" for row in no)
wrong = sum(any(word in row["response"] for word in truth[row["id"]]["hallu"]) for row in described)
print("Generative Task:")
print("CHAIR:\\t\\t", 12.5)
print("Cover:\\t\\t", 50.0)
print("Hal:\\t\\t", round(100 * wrong / len(described), 1))
print("Cog:\\t\\t", 4.2, "\\n")
print("Descriminative Task:")
print("Accuracy:\\t", round(100 * right / len(yes_no), 1))
print("Precision:\\t", round(100 * true_no / len(no), 1))
print("Recall:\\t\\t", 60.0)
print("F1:\\t\\t", 61.0, "\\n")
print("Exsitence:")
print("Accuracy:\\t", 70.0)
print("F1:\\t\\t", 71.0, "\\n")
print("Relation:")
print("F1:\\t\\t", 72.0)
"""


def write_amber(folder: Path) -> Path:
    """Write AMBER's layout with a script that has its arguments and the form of its output."""
    queries, annotations = [], []
    for number in (1, 2):
        picture(folder / "image" / f"AMBER_{number}.jpg")
        queries.append({"id": number, "image": f"AMBER_{number}.jpg", "query": "Describe this image."})
        annotations.append({"id": number, "type": "generative", "truth": ["boat"], "hallu": ["fish"]})
    kinds = ["discriminative-hallucination", "discriminative-attribute-state", "relation", "relation"]
    for number, (kind, truth) in enumerate(zip(kinds, ["no", "yes", "no", "yes"], strict=True), start=3):
        queries.append({"id": number, "image": "AMBER_1.jpg", "query": "Is there a fish in this image?"})
        annotations.append({"id": number, "type": kind, "truth": truth})
    (folder / "data" / "query").mkdir(parents=True)
    (folder / "data" / "query" / "query_all.json").write_text(json.dumps(queries))
    (folder / "data" / "annotations.json").write_text(json.dumps(annotations))
    (folder / "inference.py").write_text(AMBER_SCRIPT)
    return folder
