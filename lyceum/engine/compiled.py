"""The decode step compiled: in another process while the engine goes on, kept on disk, used where it is faster.

Why: a step of a small model is some hundred short operators, and calling them takes longer than what they compute
(`lyceum.model.step`). torch's compiler (export, then AOTInductor) makes one library of it, for any number of positions: one for
a single row, one for 2 to MOST_ROWS of them. That takes a minute of one core, at the lowest priority; the next process finds it
on disk, by a key of all that it depends on. Its weights are the engine's own, given to it at each call.

    swift = Swift(packed)
    logits_BV = swift.logits(ids, starts, slots, usual)     # usual(): the step as it is without it

Which way a step goes is measured on the steps themselves (`lyceum.engine.probe`): as it is or compiled, on all threads, half of
them, and so on to one.
The numbers are the same but for rounding, so nothing that trains asks for it. Without a C++ compiler the step stays as it is, and
the log says so once.

Run by: `Engine(swift=True)`; by itself (`python -m lyceum.engine.compiled`) it is the process that compiles.
Shapes: B rows that decode, S positions that may be seen, V vocabulary.
What it is not: for prompts, for a GPU (`lyceum.engine.graphs`), for weights in 16 bits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from collections.abc import Sequence as Many
from functools import cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from lyceum import device
from lyceum.engine.graphs import Graphs
from lyceum.engine.probe import Probe
from lyceum.log import log
from lyceum.model.packed import PackedDecoder
from lyceum.model.spec import ModelSpec, RopeScaling
from lyceum.model.step import FEW_OPERATOR, Step

MOST_ROWS = 32  # what products of few rows serve
MOST_PARAMETERS = 50_000_000  # of larger models reading the weights is what a step waits for


class Way(NamedTuple):
    """How a step is taken."""

    is_compiled: bool
    threads: int


class Swift:
    """The decode steps of one engine. Not safe to call from several threads, as the engine is not."""

    def __init__(self, packed: PackedDecoder) -> None:
        self._threads = torch.get_num_threads()
        self._libraries: dict[bool, Library] = {}  # of one row, of several
        self._probes: dict[int, tuple[bool, Probe[Way]]] = {}
        self._seen_C = torch.arange(packed.spec.context_length)
        self.update(packed)

    def update(self, packed: PackedDecoder) -> None:
        """The weights have changed."""
        self._packed = packed
        self._weights: dict[bool, tuple[Tensor, ...]] = {}

    def logits(self, ids: list[int], starts: list[int], slots: Many[Tensor], usual: Callable[[], Tensor]) -> Tensor:
        """The logits (B, V) of the tokens that follow, by the way that has been fastest for about so many rows.

        ids, starts: of each row its token, and how many tokens its slot holds. slots: of each layer (2, rows, K, time, E);
        row b is slot b. usual: the step as it is without this.
        """
        if len(ids) > MOST_ROWS or not slots:
            return usual()
        probe = self._probe(len(ids))
        way = probe.choose()
        begun = time.perf_counter()
        take = (lambda: self._compiled(ids, starts, slots)) if way.is_compiled else usual
        logits_BV = _on_threads(way.threads, take)
        probe.note(time.perf_counter() - begun)
        return logits_BV

    def _probe(self, num_rows: int) -> Probe[Way]:
        is_several = num_rows > 1
        if is_several not in self._libraries:
            self._libraries[is_several] = Library(self._packed, is_several)
        is_ready = self._libraries[is_several].is_ready
        number = (num_rows - 1).bit_length()
        if number not in self._probes or self._probes[number][0] != is_ready:
            counts = _halves(self._threads)
            ways = [Way(is_compiled, count) for is_compiled in (False, True)[: 1 + is_ready] for count in counts]
            self._probes[number] = is_ready, Probe(ways)
        return self._probes[number][1]

    def _compiled(self, ids: list[int], starts: list[int], slots: Many[Tensor]) -> Tensor:
        is_several = len(ids) > 1
        if is_several not in self._weights:
            tensors = self._packed.tensors(few=is_several)
            self._weights[is_several] = tuple(tensors[name] for name in sorted(tensors))
        now_2B, seen_S = torch.tensor([ids, starts]), self._seen_C[: max(starts) + 1]
        return self._libraries[is_several].run([now_2B, seen_S, *slots, *self._weights[is_several]])


Fast = Swift | Graphs


def renewed(old: Fast | None, packed: PackedDecoder | None) -> Fast | None:
    """What decodes with these weights from now on; None where nothing is gained by it, or it cannot be."""
    if packed is None or (kind := _kind(packed)) is None:
        return None
    if old is None or type(old) is not kind:
        return kind(packed)
    old.update(packed)
    return old


def _kind(packed: PackedDecoder) -> type[Swift] | type[Graphs] | None:
    weight = packed.model.output_weight
    if weight.device.type == "cuda":
        return Graphs if weight.dtype != torch.float64 else None
    is_small = packed.spec.num_parameters()["total"] <= MOST_PARAMETERS
    is_plain = weight.device.type == "cpu" and weight.dtype == torch.float32 and not packed.half
    return Swift if is_small and is_plain and torch.backends.mkl.is_available() else None


def _halves(most: int) -> list[int]:
    """All of them, half of them, ..., one."""
    return [most, *_halves(most // 2)] if most > 1 else [1]


def _on_threads(count: int, work: Callable[[], Tensor]) -> Tensor:
    before = torch.get_num_threads()
    if count == before:
        return work()
    torch.set_num_threads(count)
    try:
        return work()
    finally:
        torch.set_num_threads(before)


class Library:
    """One compiled step: on disk already, or being made by a process of its own."""

    def __init__(self, packed: PackedDecoder, is_several: bool) -> None:
        shapes = {name: list(tensor.shape) for name, tensor in packed.tensors(few=False).items()}
        few = [name for name in packed.tensors(few=True) if name.endswith(".few")] if is_several else []
        self._order = json.dumps(
            {
                "spec": dataclasses.asdict(packed.spec),
                "shapes": shapes,
                "few": few,
                "is_several": is_several,
            },
            sort_keys=True,
        )
        self.path = folder() / f"{_key(self._order)}.pt2"
        self._loaded: Any = None
        self._process: subprocess.Popen[bytes] | None = None
        if self.path.exists():
            self._load()
        elif device.has_compiler():
            self._begin()
        else:
            _give_up(f"there is no C++ compiler ({', '.join(device.COMPILERS)})")

    @property
    def is_ready(self) -> bool:
        """Whether it can run."""
        if self._process is not None and (code := self._process.poll()) is not None:
            self._said.seek(0)
            lines = self._said.read().decode("utf-8", "replace").splitlines()
            self._process = None
            self._end()
            if code == 0 and self.path.exists():
                self._load()
            else:
                _give_up(next((line for line in reversed(lines) if "Error" in line), f"compiling ended with {code}"))
        return self._loaded is not None

    def run(self, inputs: list[Tensor]) -> Tensor:
        """Its only output."""
        return self._loaded.run(inputs)[0]

    def _load(self) -> None:
        try:  # torch.export's own way to it imports the compiler, for seconds; a library needs none of that
            self._loaded = torch._C._aoti.AOTIModelPackageLoader(str(self.path), "model", True, 1, -1)
        except (RuntimeError, AttributeError) as error:  # a broken file; a torch that has moved its loader
            _give_up(f"{self.path} cannot be read: {str(error).splitlines()[0]}")

    def _begin(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-m", "lyceum.engine.compiled", str(self.path)]
        self._said = tempfile.TemporaryFile()
        with tempfile.TemporaryFile() as order:  # files, not pipes: nobody here waits to read or write
            order.write(self._order.encode())
            order.seek(0)
            self._process = subprocess.Popen(
                command, stdin=order, stdout=subprocess.DEVNULL, stderr=self._said, env=environment
            )
        self._end = weakref.finalize(self, _ended, self._process, self._said)


def _ended(process: subprocess.Popen[bytes], said: IO[bytes]) -> None:
    process.kill()
    process.wait()
    said.close()


@cache  # said once, though there are two libraries, and perhaps several engines
def _give_up(reason: str) -> None:
    log.info(f"the decode step stays uncompiled: {reason}")


def folder() -> Path:
    """Where compiled steps are kept: the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lyceum" / "steps"


def _key(order: str) -> str:
    files = [Path(__file__), Path(__file__).parent.parent / "model" / "step.py"]
    code = "".join(file.read_text(encoding="utf-8") for file in files)
    machine = (torch.__version__, torch.backends.cpu.get_cpu_capability(), device.facts()["processor"], sys.platform)
    return hashlib.sha256(repr((order, code, machine)).encode()).hexdigest()[:32]


# -- the process that compiles ------------------------------------------------------------------------------------------


def compile_step(order: dict[str, Any], path: Path) -> None:
    """Compile the step that `order` describes into a package at `path`, which appears there whole or not at all."""
    import torch._inductor  # seconds
    from torch.export import Dim, export

    scaling = order["spec"].pop("rope_scaling")
    spec = ModelSpec(**order["spec"], rope_scaling=RopeScaling(**scaling) if scaling else None)
    weights = {name: torch.empty(shape) for name, shape in order["shapes"].items()}
    weights |= {name: torch.empty(weights[name.removesuffix(".few")].shape) for name in order["few"]}
    weights = {name: weights[name] for name in sorted(weights)}
    num_rows = 3 if order["is_several"] else 1
    shape = (2, 5, spec.num_kv_heads, 24, spec.head_width)
    slots = tuple(torch.zeros(shape) for _ in range(spec.num_layers))
    inputs = torch.zeros(2, num_rows, dtype=torch.long), torch.arange(9), slots, tuple(weights.values())
    rows, seen = Dim("rows", min=2, max=MOST_ROWS), Dim("seen", min=2, max=spec.context_length)
    room = {1: Dim("slots", min=1, max=1 << 20), 3: Dim("time", min=2, max=1 << 30)}
    dynamic = ({1: rows} if order["is_several"] else None, {0: seen}, (room,) * len(slots), (None,) * len(weights))
    _lower_few()
    with torch.no_grad():
        program = export(Step(spec, tuple(weights)), inputs, dynamic_shapes=dynamic, strict=False)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_name(f"{path.stem}-{os.getpid()}.pt2")
    try:
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(partial),
            inductor_configs={"cpp.threads": 1},  # products take what torch has
        )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _lower_few() -> None:
    """Tell the compiler that `lyceum::few` is torch's own call of MKL, with as many rows as there are."""
    from torch._inductor.ir import TensorBox
    from torch._inductor.lowering import register_lowering
    from torch._inductor.mkldnn_ir import MKLPackedLinear

    def lowered(x: Any, packed: Any, weight: Any) -> Any:
        return TensorBox.create(MKLPackedLinear.create(x, packed, weight, None, x.get_size()[0]))

    assert FEW_OPERATOR == "lyceum::few"
    register_lowering(torch.ops.lyceum.few.default, type_promotion_kind=None)(lowered)


if __name__ == "__main__":
    os.nice(19)
    compile_step(json.load(sys.stdin), Path(sys.argv[1]))
