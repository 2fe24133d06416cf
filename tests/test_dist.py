"""Ranks: one needs nothing, two add up what they have."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from lyceum import dist

TWO = """
import json
import torch
from lyceum import dist

dist.start()
dist.start()  # a second time is nothing
me = dist.rank() + 1.0
weights = torch.nn.Parameter(torch.full((2, 3), me))
double = torch.tensor([me, 10 * me], dtype=torch.float64)
column = torch.arange(6.0).reshape(2, 3).T.contiguous().T * me  # not contiguous
dist.sum_tensors(weights, double, column)
numbers = dist.sum_numbers({"tokens": me, "rows": 2 * me})
gathered = dist.gather(["ab", me][: dist.rank() + 1])
dist.barrier()
print(json.dumps([weights.tolist(), double.tolist(), column.tolist(), numbers, gathered, dist.share("abcde"), dist.is_main()]))
dist.stop()
"""


def test_one_rank_needs_no_group_and_sums_nothing() -> None:
    import torch

    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    dist.start()
    dist.barrier()
    tensor = torch.ones(2)
    dist.sum_tensors(tensor)
    assert tensor.tolist() == [1.0, 1.0]
    assert dist.sum_numbers({"a": 2.5}) == {"a": 2.5}
    assert dist.share([1, 2, 3]) == dist.gather([1, 2, 3]) == [1, 2, 3]
    assert not torch.distributed.is_initialized()
    dist.stop()


def test_two_ranks_add_up_and_share_out() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO],
            env={**os.environ, **group, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    summed = "[[[3.0, 3.0, 3.0], [3.0, 3.0, 3.0]], [3.0, 30.0], [[0.0, 3.0, 6.0], [9.0, 12.0, 15.0]], "
    summed += '{"tokens": 3.0, "rows": 6.0}, ["ab", "ab", 2.0], '
    assert said[0].strip() == summed + '["a", "c", "e"], true]'
    assert said[1].strip() == summed + '["b", "d"], false]'
