"""A training script of the SDK's style: ChainerMN over MPI. As the published sample does, it writes its reports to ./result."""

import argparse
import os

import chainer
import chainer.functions as F
import chainer.links as L
import chainermn
import numpy as np
from azureml.core.run import Run
from chainer import training
from chainer.training import extensions
from sklearn.datasets import load_digits


class MLP(chainer.Chain):
    def __init__(self, n_units, n_out):
        super().__init__(l1=L.Linear(64, n_units), l2=L.Linear(n_units, n_out))

    def __call__(self, x):
        return self.l2(F.relu(self.l1(x)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--batchsize", "-b", type=int, default=100)
    parser.add_argument("--epochs", "-e", type=int, default=5)
    parser.add_argument("--communicator", default="naive")
    parser.add_argument("--out", "-o", default="result")
    args = parser.parse_args()
    run = Run.get_context()

    comm = chainermn.create_communicator(args.communicator)
    if comm.rank == 0:
        print("Num process (COMM_WORLD):", comm.size)
        run.log("processes", comm.size)
        images, labels = load_digits(return_X_y=True)
        pairs = chainer.datasets.TupleDataset(np.float32(images / 16), np.int32(labels))
        train, test = chainer.datasets.split_dataset_random(pairs, 1437, seed=0)
    else:
        train, test = None, None
    train = chainermn.scatter_dataset(train, comm, shuffle=True, seed=0)
    test = chainermn.scatter_dataset(test, comm)

    model = L.Classifier(MLP(64, 10))
    optimizer = chainermn.create_multi_node_optimizer(chainer.optimizers.Adam(), comm)
    optimizer.setup(model)
    train_iter = chainer.iterators.SerialIterator(train, args.batchsize)
    test_iter = chainer.iterators.SerialIterator(test, args.batchsize, repeat=False, shuffle=False)
    updater = training.updaters.StandardUpdater(train_iter, optimizer)
    trainer = training.Trainer(updater, (args.epochs, "epoch"), out=args.out)
    trainer.extend(chainermn.create_multi_node_evaluator(extensions.Evaluator(test_iter, model), comm))
    if comm.rank == 0:
        trainer.extend(extensions.LogReport())
        trainer.extend(extensions.PrintReport(["epoch", "main/loss", "validation/main/accuracy"]))
    trainer.run()
    if comm.rank == 0:
        run.log("Accuracy", trainer.get_extension("LogReport").log[-1]["validation/main/accuracy"])
        os.makedirs("outputs", exist_ok=True)
        chainer.serializers.save_npz("outputs/model.npz", model)


if __name__ == "__main__":
    main()
