"""Train a small network on handwritten digits with Keras and Horovod, on one rank or many; the script is the same.

``python tensorflow_digits.py``, or ``mpirun -np 2 python tensorflow_digits.py``, or ``horovodrun --gloo -np 2 python
tensorflow_digits.py`` (with Open MPI 5 it needs ``--gloo``, or ``--binding-args="--bind-to none --map-by slot"``), or
``dtrain run -n 2 --launcher horovod tensorflow_digits.py``.
"""

import argparse

import numpy as np

import dtrain
import dtrain.tensorflow  # before tensorflow: it keeps its start-up messages off

# isort: split
import tensorflow as tf


def load_digits():
    """scikit-learn's 1,797 images of 8 x 8, of which 360 are kept for validation."""
    from sklearn.datasets import load_digits as load

    images, labels = load(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(images))
    images, labels = np.float32(images[order] / 16), np.int32(labels[order])
    return (images[:-360], labels[:-360]), (images[-360:], labels[-360:])


def main():
    parser = argparse.ArgumentParser(description="Train a network on handwritten digits.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64, help="samples in a step, of all ranks together")
    parser.add_argument("--units", type=int, default=128)
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    run = dtrain.init()

    def build_model():
        model = tf.keras.Sequential(
            [
                tf.keras.layers.Input((64,)),
                tf.keras.layers.Dense(args.units, activation="relu"),
                tf.keras.layers.Dense(args.units, activation="relu"),
                tf.keras.layers.Dense(10, activation="softmax"),
            ]
        )
        model.compile(tf.keras.optimizers.Adam(0.003), "sparse_categorical_crossentropy", metrics=["accuracy"])
        return model

    train, test = load_digits()
    trainer = dtrain.tensorflow.Trainer(
        build_model,
        train,
        test,
        run=run,
        epochs=args.epochs,
        batch_size=args.batch_size,
        device=args.device,
        seed=args.seed,
    )
    trainer.run()
    path = trainer.save_model("model.keras")
    if run.rank == 0:
        print(f"saved {path}")


if __name__ == "__main__":
    main()
