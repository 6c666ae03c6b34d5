"""Trains a tiny model as its arguments say and keeps its weights: what test_training.py starts, on any number of ranks.

``--die RANK:STEP`` kills that rank with SIGKILL in the middle of that step.
"""

from __future__ import annotations

import argparse
import os
import signal
from typing import Any

import numpy as np

import dtrain
import dtrain.chainer

# isort: split
import chainer
import chainer.functions as F
import chainer.links as L

OPTIMIZERS = {
    "adam": lambda: chainer.optimizers.Adam(0.01),
    "sgd": lambda: chainer.optimizers.SGD(0.1),
    "momentum": lambda: chainer.optimizers.MomentumSGD(0.05),
}


class Network(chainer.Chain):
    def __init__(self, plain: bool) -> None:
        super().__init__()
        self._plain = plain
        with self.init_scope():
            self.l1 = L.Linear(None, 16)
            self.norm = L.BatchNormalization(16)
            self.l2 = L.Linear(None, 4)

    def forward(self, x: Any) -> Any:
        h = self.l1(x)
        return self.l2(F.relu(h) if self._plain else F.dropout(F.relu(self.norm(h)), 0.3))


class Killer:
    """An optimizer hook: called when the gradients are exchanged and the weights not yet changed."""

    def __init__(self, die_at: int) -> None:
        self._left = die_at

    def __call__(self, _: Any) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def make_data(count: int) -> Any:
    random = np.random.RandomState(1)
    x = random.randn(count, 6).astype(np.float32)
    return chainer.datasets.TupleDataset(x, (x[:, 0] > 0).astype(np.int32) + 2 * (x[:, 1] > 0).astype(np.int32))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", required=True)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adam")
    parser.add_argument("--plain", action="store_true", help="no dropout and no batch normalization")
    parser.add_argument("--samples", type=int, default=101)
    parser.add_argument("--batch-size", type=int, default=18)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--checkpoint-every", type=int, default=4)
    parser.add_argument("--loop", choices=["dtrain", "chainer"], default="dtrain")
    parser.add_argument("--die", default="-1:0")
    args = parser.parse_args()
    run = dtrain.init()
    rank, step = map(int, args.die.split(":"))
    model = L.Classifier(Network(args.plain))
    optimizer = OPTIMIZERS[args.optimizer]().setup(model)
    if rank == run.rank:
        optimizer.add_hook(Killer(step), "killer")
    train, test = make_data(args.samples), make_data(37)
    if args.loop == "dtrain":
        trainer = dtrain.chainer.Trainer(
            model,
            optimizer,
            train,
            test,
            run=run,
            epochs=args.epochs,
            batch_size=args.batch_size,
            checkpoint_every=args.checkpoint_every,
        )
        trainer.run()
    else:
        run_chainer_loop(args, run, model, optimizer, train)
    chainer.serializers.save_npz(f"{args.weights}-{run.rank}.npz", model)


def run_chainer_loop(args: Any, run: dtrain.Run, model: Any, optimizer: Any, train: Any) -> None:
    """Chainer's own parts with ChainerMN's optimizer; only extend() is ours."""
    import chainermn

    dtrain.chainer.seed_random(0)
    comm = dtrain.chainer.create_communicator(run)
    optimizer = chainermn.create_multi_node_optimizer(optimizer, comm)
    shard = chainermn.scatter_dataset(train, comm, shuffle=True, seed=0)
    iterator = chainer.iterators.SerialIterator(shard, args.batch_size // run.size)
    updater = chainer.training.StandardUpdater(iterator, optimizer)
    loop = chainer.training.Trainer(updater, (args.epochs, "epoch"), out=run.outputs)
    dtrain.chainer.extend(loop, run, checkpoint_every=args.checkpoint_every)
    loop.extend(
        chainer.training.extensions.ExponentialShift("lr" if args.optimizer != "adam" else "alpha", 0.9), trigger=(3, "iteration")
    )
    loop.extend(chainer.training.extensions.LogReport(trigger=(5, "iteration")))
    loop.run()


if __name__ == "__main__":
    main()
