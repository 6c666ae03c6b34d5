"""Train a small network on handwritten digits with Chainer, on one rank or many; the script is the same.

``python chainer_digits.py``, or ``mpirun -np 2 python chainer_digits.py``, or ``dtrain run -n 2 chainer_digits.py``.
"""

import argparse
import sys

import numpy as np

import dtrain
import dtrain.chainer  # before chainer: it makes Chainer work on today's NumPy

# isort: split
import chainer
import chainer.functions as F
import chainer.links as L


class MLP(chainer.Chain):
    def __init__(self, units, classes):
        super().__init__()
        with self.init_scope():
            self.l1 = L.Linear(None, units)
            self.l2 = L.Linear(None, units)
            self.l3 = L.Linear(None, classes)

    def forward(self, x):
        return self.l3(F.relu(self.l2(F.relu(self.l1(x)))))


def load_digits():
    """scikit-learn's 1,797 images of 8 x 8, of which 360 are kept for validation."""
    from sklearn.datasets import load_digits as load

    images, labels = load(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(images))
    pairs = chainer.datasets.TupleDataset(np.float32(images[order] / 16), np.int32(labels[order]))
    return chainer.datasets.split_dataset(pairs, len(pairs) - 360)


def load_mnist():
    try:
        return chainer.datasets.get_mnist()
    except OSError as error:
        sys.exit(f"MNIST is not here and cannot be downloaded ({error}); use --data digits")


def main():
    parser = argparse.ArgumentParser(description="Train a network on handwritten digits.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64, help="samples in a step, of all ranks together")
    parser.add_argument("--units", type=int, default=128)
    parser.add_argument("--data", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    run = dtrain.init()
    train, test = load_digits() if args.data == "digits" else load_mnist()
    trainer = dtrain.chainer.Trainer(
        L.Classifier(MLP(args.units, classes=10)),
        chainer.optimizers.Adam(),
        train,
        test,
        run=run,
        epochs=args.epochs,
        batch_size=args.batch_size,
        device=args.device,
        seed=args.seed,
    )
    trainer.run()
    path = trainer.save_model("model.npz")
    if run.rank == 0:
        print(f"saved {path}")


if __name__ == "__main__":
    main()
