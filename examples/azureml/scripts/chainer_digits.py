"""A training script of the SDK's style: Chainer on one node. Logs to its run, and leaves the model in ./outputs."""

import argparse
import os

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from azureml.core.run import Run
from chainer import training
from chainer.training import extensions
from sklearn.datasets import load_digits


class MLP(chainer.Chain):
    def __init__(self, n_units, n_out):
        super().__init__()
        with self.init_scope():
            self.l1 = L.Linear(None, n_units)
            self.l2 = L.Linear(None, n_out)

    def __call__(self, x):
        return self.l2(F.relu(self.l1(x)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--batchsize", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--output_dir", default="./outputs")
    args = parser.parse_args()
    run = Run.get_context()
    run.log("Batch size", int(args.batchsize))

    images, labels = load_digits(return_X_y=True)
    pairs = chainer.datasets.TupleDataset(np.float32(images / 16), np.int32(labels))
    train, test = chainer.datasets.split_dataset_random(pairs, 1437, seed=0)
    model = L.Classifier(MLP(64, 10))
    optimizer = chainer.optimizers.Adam()
    optimizer.setup(model)
    train_iter = chainer.iterators.SerialIterator(train, args.batchsize)
    test_iter = chainer.iterators.SerialIterator(test, args.batchsize, repeat=False, shuffle=False)
    updater = training.updaters.StandardUpdater(train_iter, optimizer)
    trainer = training.Trainer(updater, (args.epochs, "epoch"), out=args.output_dir)
    trainer.extend(extensions.Evaluator(test_iter, model))
    trainer.extend(extensions.LogReport())

    @training.make_extension(trigger=(1, "epoch"), priority=training.PRIORITY_READER - 1)
    def log_epoch(trainer):
        entry = trainer.get_extension("LogReport").log[-1]
        run.log("Loss", entry["main/loss"])
        run.log("Accuracy", entry["validation/main/accuracy"])

    trainer.extend(log_epoch)
    trainer.run()
    chainer.serializers.save_npz(os.path.join(args.output_dir, "model.npz"), model)
    print("saved", os.listdir(args.output_dir))


if __name__ == "__main__":
    main()
