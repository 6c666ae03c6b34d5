"""Step time of dtrain.chainer.Trainer against ChainerMN on its own communicator, and on dtrain's, alternating in one run.

``mpirun -np 2 python benchmarks/bench_chainer.py --json benchmarks/results/chainer_<hardware>_<yyyymm>.json``, with
OMP_NUM_THREADS=1.

Every side trains the same network (784-1000-1000-10) from the same weights on the same batches with Chainer's loop, and its
final weights are compared with dtrain's: a side that computes something else is an error, not a figure. dtrain's side also
records a row of metrics at every step, as users get it; the others record nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import dtrain
import dtrain.chainer
from dtrain.chainer.iterator import GlobalBatchIterator

# isort: split
import chainer
import chainer.functions as F
import chainer.links as L
import chainermn

OPTIMIZERS = {"adam": chainer.optimizers.Adam, "sgd": chainer.optimizers.SGD}
WARM_UP = 5
"""First steps of a block that do not count: buffers are made, caches are filled."""


class Clock(chainer.training.Extension):  # type: ignore[misc]
    """Takes the time after everything else in a step."""

    priority = -2_000_000

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, trainer: Any) -> None:
        self.times.append(time.perf_counter())


def make_model() -> Any:
    dtrain.chainer.seed_random(0)
    return L.Classifier(chainer.Sequential(L.Linear(784, 1000), F.relu, L.Linear(1000, 1000), F.relu, L.Linear(1000, 10)))


def run_dtrain(run: dtrain.Run, optimizer: Any, data: Any, batch: int) -> tuple[Any, list[float]]:
    model, clock = make_model(), Clock()
    trainer = dtrain.chainer.Trainer(
        model,
        optimizer,
        data,
        run=run,
        epochs=1,
        batch_size=batch * run.size,
        device="cpu",
        checkpoint_every="never",
        progress=False,
    )
    trainer.loop.extend(clock, trigger=(1, "iteration"))
    trainer.run()
    return model, clock.times


def run_chainermn(run: dtrain.Run, optimizer: Any, data: Any, batch: int, communicator: Any) -> tuple[Any, list[float]]:
    model, clock = make_model(), Clock()
    order = GlobalBatchIterator(range(len(data)), batch * run.size, rank=run.rank, size=run.size)
    mine = [index for _ in range(len(data) // (batch * run.size)) for index in order.next()]
    others = np.setdiff1d(np.arange(len(data)), mine)  # SubDataset wants an order of everything
    shard = chainer.datasets.SubDataset(data, 0, len(mine), order=np.concatenate([mine, others]))
    multi_node = chainermn.create_multi_node_optimizer(optimizer, communicator)
    multi_node.setup(model)
    if hasattr(multi_node, "is_changed"):
        multi_node.is_changed(model)  # otherwise its first update only broadcasts, and the sides would not train the same
    updater = chainer.training.StandardUpdater(chainer.iterators.SerialIterator(shard, batch, shuffle=False), multi_node)
    loop = chainer.training.Trainer(updater, (1, "epoch"), out=run.outputs)
    loop.extend(clock, trigger=(1, "iteration"))
    loop.run()
    return model, clock.times


def largest_difference(one: Any, other: Any) -> float:
    pairs = zip(one.params(), other.params(), strict=True)
    return max(float(np.abs(a.array - b.array).max()) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128, help="samples a rank takes in a step")
    parser.add_argument("--steps", type=int, default=25, help=f"steps of a block; the first {WARM_UP} do not count")
    parser.add_argument("--blocks", type=int, default=8, help="blocks of each side")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adam")
    parser.add_argument("--json", type=Path, help="where the raw figures go")
    args = parser.parse_args()

    run = dtrain.init(workspace=tempfile.mkdtemp())
    random = np.random.RandomState(0)
    count = args.batch * run.size * args.steps
    data = chainer.datasets.TupleDataset(
        random.rand(count, 784).astype(np.float32), random.randint(0, 10, count).astype(np.int32)
    )
    # Of ChainerMN's communicators, naive is the one that works without a GPU.
    ours = dtrain.chainer.create_communicator(run)
    sides: dict[str, Any] = {"dtrain": None, "chainermn+dtrain": ours, "naive": chainermn.create_communicator("naive")}
    steps_ms: dict[str, list[float]] = {name: [] for name in sides}
    differences = dict.fromkeys(sides, 0.0)
    for block in range(args.blocks):
        names = list(sides)[block % 3 :] + list(sides)[: block % 3]  # so that none is always first
        models: dict[str, Any] = {}
        for name in names:
            run.comm.barrier()
            optimizer = OPTIMIZERS[args.optimizer]()
            parts = (run, optimizer, data, args.batch)
            models[name], times = run_dtrain(*parts) if name == "dtrain" else run_chainermn(*parts, sides[name])
            steps_ms[name] += [1000 * value for value in np.diff(times)[WARM_UP - 1 :]]
        for name in sides:
            differences[name] = max(differences[name], largest_difference(models["dtrain"], models[name]))
    if max(differences.values()) > 1e-3:
        sys.exit(f"the sides do not compute the same; largest difference from dtrain's weights: {differences}")
    if run.rank == 0:
        report(args, run.size, steps_ms, differences)


def report(args: argparse.Namespace, size: int, steps_ms: dict[str, list[float]], differences: dict[str, float]) -> None:
    medians = {name: statistics.median(values) for name, values in steps_ms.items()}
    print(f"{size} ranks, batch {args.batch} a rank, {args.optimizer}, {len(steps_ms['dtrain'])} steps each; ms a step on rank 0")
    for name, values in steps_ms.items():
        low, high = np.percentile(values, [10, 90])
        ratio = medians[name] / medians["dtrain"]
        print(f"{name:16} median {medians[name]:6.2f}  p10 {low:6.2f}  p90 {high:6.2f}  {ratio:5.2f} of dtrain")
    if args.json is not None:
        record = {
            "what": "ms a step on rank 0, MLP 784-1000-1000-10",
            "arguments": {key: str(value) for key, value in vars(args).items() if key != "json"},
            "ranks": size,
            "median_ms": medians,
            "largest_weight_difference": differences,
            "machine": {
                "processor": platform.machine(),
                "cores": os.cpu_count(),
                "system": platform.platform(),
            },
            "versions": {"python": platform.python_version(), "numpy": np.__version__, "chainer": chainer.__version__},
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "steps_ms": {name: [round(value, 4) for value in values] for name, values in steps_ms.items()},
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
