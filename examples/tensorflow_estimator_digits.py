"""Classify handwritten digits with tf.estimator (TensorFlow 2.15 and earlier): a chief and workers train, an evaluator validates.

``dtrain run --launcher parameter_server --workers 2 --servers 1 --chief --evaluator tensorflow_estimator_digits.py``. With
``--tf-config master`` the master validates; alone, it does both: ``python tensorflow_estimator_digits.py``.
"""

import argparse

import numpy as np

import dtrain
import dtrain.tensorflow  # before tensorflow: it quiets its start

# isort: split
import tensorflow as tf

if not hasattr(tf, "estimator"):
    raise SystemExit(
        f"TensorFlow {tf.__version__} has no Estimator any more; install 2.15 (constraints/keras2.txt) for this script"
    )


class Record(tf.estimator.FinalExporter):
    """Records every evaluation, and exports the last one's model."""

    def __init__(self, run, *args):
        super().__init__(*args)
        self.run = run

    def export(self, estimator, export_path, checkpoint_path, eval_result, is_the_final_export):
        step = int(eval_result["global_step"])
        loss, accuracy = float(eval_result["average_loss"]), float(eval_result["accuracy"])
        self.run.log_row(step, loss=loss, accuracy=accuracy)
        print(f"step {step}  loss {loss:.4g}  validation {accuracy:.4f}")
        return super().export(estimator, export_path, checkpoint_path, eval_result, is_the_final_export)


def load_digits():
    """scikit-learn's 1,797 images of 8 x 8, of which 360 are kept for validation."""
    from sklearn.datasets import load_digits as load

    images, labels = load(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(images))
    images, labels = np.float32(images[order] / 16), np.int64(labels[order])
    return (images[:-360], labels[:-360]), (images[-360:], labels[-360:])


def parse_arguments():
    parser = argparse.ArgumentParser(description="Train a canned estimator on handwritten digits.")
    parser.add_argument("--steps", type=int, default=1000, help="of all workers together")
    parser.add_argument("--batch-size", type=int, default=32, help="samples in a step of one worker")
    parser.add_argument("--model-dir", help="a folder from which to go on; by default outputs/estimator of a new run")
    return parser.parse_args()


def main():
    args = parse_arguments()
    run = dtrain.init()
    tf.get_logger().setLevel("ERROR")  # every call of an Estimator is deprecated, and says so
    train, test = load_digits()

    def batches():
        data = tf.data.Dataset.from_tensor_slices(({"pixels": train[0]}, train[1]))
        return data.shuffle(len(train[0])).repeat().batch(args.batch_size)

    def validation():
        return tf.data.Dataset.from_tensor_slices(({"pixels": test[0]}, test[1])).batch(len(test[0]))

    config = tf.estimator.RunConfig(
        model_dir=args.model_dir or str(run.outputs / "estimator"),
        save_checkpoints_steps=max(1, args.steps // 4),
        experimental_max_worker_delay_secs=0,  # else worker N begins 5 (N + 1) seconds after the chief
    )
    pixels = tf.feature_column.numeric_column("pixels", shape=[64])
    estimator = tf.estimator.DNNClassifier([128, 128], [pixels], n_classes=10, optimizer="Adam", config=config)
    serving = tf.estimator.export.build_parsing_serving_input_receiver_fn(tf.feature_column.make_parse_example_spec([pixels]))
    tf.estimator.train_and_evaluate(
        estimator,
        tf.estimator.TrainSpec(batches, max_steps=args.steps),
        # An evaluator looks for the first checkpoint after two minutes, and for the next ones every ten, unless told otherwise.
        tf.estimator.EvalSpec(validation, None, exporters=Record(run, "model", serving), start_delay_secs=1, throttle_secs=1),
    )
    print(f"{run.role} {run.index} is done")


if __name__ == "__main__":
    main()
