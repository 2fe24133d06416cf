"""What must hold of any stream: purity, whole epochs, exact shares; and batches against rows read one by one."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from lyceum.batches.shards import Shards, write_shards
from lyceum.batches.stream import Stream, token_batch
from lyceum.corpus.records import Document
from lyceum.errors import DataError
from lyceum.tokens.tokenizer import Tokenizer

ROWS, WEIGHTS = {"docs": 37, "code": 200, "web": 5}, {"docs": 3.0, "code": 1.0}


def test_row_k_is_a_function_of_k_and_the_seed_alone() -> None:
    straight = [Stream(ROWS, WEIGHTS, seed=3).at(k) for k in range(500)]
    one = Stream(ROWS, WEIGHTS, seed=3)
    assert [one.at(k) for k in reversed(range(500))] == straight[::-1]  # in any order, after anything
    assert [Stream(ROWS, WEIGHTS, seed=3).at(k) for k in range(400, 410)] == straight[400:410]  # resumed
    assert [Stream(ROWS, WEIGHTS, seed=4).at(k) for k in range(500)] != straight


def test_every_row_of_a_part_comes_once_an_epoch_in_another_order_each_time() -> None:
    stream = Stream(ROWS, WEIGHTS, seed=1)
    visited: dict[str, list[int]] = {"docs": [], "code": []}
    for k in range(384):  # 3 blocks of 128: 288 rows of docs, 96 of code
        part, index = stream.at(k)
        visited[part].append(index)
    # an epoch may end inside a block, whose order is shuffled: whole epochs are compared as counts
    counts = Counter(visited["docs"])
    assert set(counts) == set(range(37)) and set(counts.values()) <= {7, 8}  # 288 = 7 * 37 + 29
    assert len(set(visited["code"])) == len(visited["code"]) == 96
    alone = Stream({"docs": 128}, {"docs": 1.0}, seed=1)
    first, second = ([alone.at(k)[1] for k in range(start, start + 128)] for start in (0, 128))
    assert sorted(first) == sorted(second) == list(range(128)) and first != second


def test_shares_are_the_weights_and_epochs_are_known_before() -> None:
    stream = Stream(ROWS, {"docs": 1.0, "code": 3.0}, seed=1)
    counts = Counter(stream.at(k)[0] for k in range(1280))
    assert counts == {"docs": 320, "code": 960}
    assert stream.epochs(1280) == {"docs": 320 / 37, "code": 960 / 200}


def test_mixture_that_wants_what_is_not_there_is_an_error_with_a_hint() -> None:
    with pytest.raises(DataError, match=r"'books'(.|\n)*hint: .*docs, code, web"):
        Stream(ROWS, {"books": 1.0}, seed=1)
    with pytest.raises(DataError, match=r"no source with a weight(.|\n)*hint: "):
        Stream(ROWS, {"docs": 0.0}, seed=1)


@pytest.fixture(scope="module")
def shards(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("run") / "shards"
    documents = [
        Document(f"what does {n} return? " * (1 + n % 3), meta={"part": "docs" if n % 4 else "code"}) for n in range(60)
    ]
    write_shards(documents, tokenizer, folder, row_tokens=9)
    return Shards(folder, tokenizer.fingerprint)


def test_batch_holds_the_streams_rows_with_every_target_at_weight_one(shards: Shards) -> None:
    stream = Stream(shards.parts, {"docs": 1.0, "code": 1.0}, seed=5)
    batch = token_batch(shards, stream, start=11, count=4)
    assert batch.tokens_BT.tolist() == [shards.row(*stream.at(k)).tolist() for k in (11, 12, 13, 14)]
    assert batch.weights_BT.tolist() == [[0.0] + [1.0] * 9] * 4
    assert batch.lengths_B.tolist() == [10] * 4
    assert (batch.num_targets, batch.num_tokens) == (36.0, 40)
    assert batch.tokens_BT.dtype == torch.int64


def test_any_number_of_ranks_sees_the_same_rows(shards: Shards) -> None:
    stream = Stream(shards.parts, {"docs": 1.0, "code": 1.0}, seed=5)
    for step in range(3):
        whole = token_batch(shards, stream, start=step * 8, count=8)
        for world in (2, 4):
            size = 8 // world
            own = Stream(shards.parts, {"docs": 1.0, "code": 1.0}, seed=5)  # made anew, as each process makes it
            pieces = [token_batch(shards, own, step * 8 + rank * size, size) for rank in range(world)]
            assert torch.equal(torch.cat([piece.tokens_BT for piece in pieces]), whole.tokens_BT)


def test_whole_epochs_of_a_part_have_every_target_of_it_equally_often(shards: Shards) -> None:
    count = shards.parts["docs"]
    stream = Stream(shards.parts, {"docs": 1.0}, seed=2)
    batch = token_batch(shards, stream, start=0, count=count * 128)  # 128 epochs: they end where a block of 128 ends
    assert stream.epochs(count * 128) == {"docs": 128.0}
    once = Counter(number for index in range(count) for number in shards.row("docs", index)[1:].tolist())
    assert Counter(batch.tokens_BT[:, 1:].flatten().tolist()) == {number: 128 * n for number, n in once.items()}
