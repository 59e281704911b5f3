"""Test reading and writing Parquet."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from csr_vlm.core.records import SCHEMA_VERSION, Finish, Node, NodeStatus, Pair, Prompt, Response
from csr_vlm.store import tables
from tests.unit.builders import node, prompt

small = st.integers(0, 2**31 - 1)
float32 = st.floats(allow_nan=False, width=32)
nodes = st.builds(
    Node,
    prompt_id=st.text(),
    iteration=small,
    node_id=st.text(),
    parent_id=st.text(),
    depth=small,
    token_ids=st.lists(small, max_size=5).map(tuple),
    token_logprobs=st.lists(float32, max_size=5).map(tuple),
    text=st.text(),
    finish=st.sampled_from(Finish),
    status=st.sampled_from(NodeStatus),
    cosines=st.dictionaries(st.text(min_size=1), float32, max_size=3),
)
replies = st.builds(
    Response,
    node_id=st.text(),
    token_ids=st.lists(small, max_size=5).map(tuple),
    logprob=st.floats(allow_nan=False),
    text=st.text(),
    num_sentences=small,
    reward=st.floats(allow_nan=False),
    complete=st.booleans(),
)
prompts = st.builds(Prompt, st.text(), st.text(), st.text())
pairs = st.builds(Pair, prompt=prompts, iteration=small, chosen=replies, rejected=replies)


@given(st.lists(nodes, max_size=6))
def test_nodes_round_trip(rows):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.parquet"
        tables.write_nodes(path, rows)
        read = list(tables.read_nodes(path))
        assert read == rows
        assert all(isinstance(row.token_ids, tuple) and isinstance(row.status, NodeStatus) for row in read)


@given(st.lists(pairs, max_size=4))
def test_pairs_round_trip(rows):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.parquet"
        tables.write_pairs(path, rows)
        assert list(tables.read_pairs(path)) == rows


@given(st.lists(prompts, min_size=1, max_size=9), st.integers(1, 4))
def test_prompts_round_trip_in_work_items(rows, size):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.parquet"
        tables.write_prompts(path, rows, size)
        groups = list(tables.prompt_groups(path))
        assert groups == [rows[at : at + size] for at in range(0, len(rows), size)]


def test_difficult_text_and_missing_scores_round_trip(tmp_path):
    rows = [
        node("0", ' "Ein\tCafé"\n – 一条船 🚢\x00\u200b.', cosine=None),
        replace(node("1"), cosines={"clip": 0.25, "siglip-2": -0.5}),
        node("2", cosine=0.25, logprobs=()),
    ]
    tables.write_nodes(tmp_path / "part.parquet", rows)
    assert list(tables.read_nodes(tmp_path / "part.parquet")) == rows


def test_the_same_rows_give_the_same_bytes(tmp_path):
    rows = [node(str(i), f"Sentence {i}.", cosine=i / 8) for i in range(50)]
    first, again, other = tmp_path / "a.parquet", tmp_path / "b.parquet", tmp_path / "c.parquet"
    tables.write_nodes(first, rows)
    tables.write_nodes(again, rows)
    tables.write_nodes(other, [*rows[:-1], replace(rows[-1], text="Another.")])
    assert first.read_bytes() == again.read_bytes()
    assert first.read_bytes() != other.read_bytes()


def test_logprobs_are_stored_in_single_precision(tmp_path):
    tables.write_nodes(tmp_path / "part.parquet", [node("0", logprobs=(-1 / 3,))])
    (read,) = tables.read_nodes(tmp_path / "part.parquet")
    assert read.token_logprobs[0] == pytest.approx(-1 / 3, rel=1e-7)
    assert read.token_logprobs[0] != -1 / 3


def test_trees_are_grouped_by_prompt_across_row_groups(tmp_path):
    rows = [
        node(str(i), cosine=0.25, prompt_id=name)
        for name, count in (("b", 3), ("a", 1), ("c", 4))
        for i in range(count)
    ]
    tables.write_nodes(tmp_path / "part.parquet", rows)
    pq.write_table(pq.read_table(tmp_path / "part.parquet"), tmp_path / "split.parquet", row_group_size=2)
    assert pq.ParquetFile(tmp_path / "split.parquet").num_row_groups == 4
    for name in ("part", "split"):
        trees = list(tables.read_trees(tmp_path / f"{name}.parquet"))
        assert [(prompt_id, len(tree)) for prompt_id, tree in trees] == [("b", 3), ("a", 1), ("c", 4)]
        assert [node for _, tree in trees for node in tree] == rows


def test_files_name_their_schema(tmp_path):
    tables.write_nodes(tmp_path / "n.parquet", [node("0")])
    tables.write_prompts(tmp_path / "p.parquet", [prompt()], 1)
    for name in ("n", "p"):
        metadata = pq.read_schema(tmp_path / f"{name}.parquet").metadata
        assert metadata[b"csr_vlm_schema"] == str(SCHEMA_VERSION).encode()


def test_an_empty_table_is_a_valid_file(tmp_path):
    tables.write_nodes(tmp_path / "part.parquet", [])
    assert list(tables.read_trees(tmp_path / "part.parquet")) == []


def test_an_invalid_row_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="too large"):
        tables.write_nodes(tmp_path / "part.parquet", [node("0", ids=(2**40,))])
    assert list(tmp_path.iterdir()) == []
