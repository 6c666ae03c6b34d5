"""What each process of a job of faults.py does: ``KIND FOLDER MODE VICTIM``. It exchanges again and again, until told to go.

All meet in FOLDER: ``works-NAME`` says that one is at work, ``steps`` how often the first has exchanged; ``go`` ends all, and at
``strike`` the VICTIM does what MODE says: ``raise``, or leave with that exit code. With MODE ``compute`` nothing is exchanged.
"""

import os
import sys
import time
from pathlib import Path

kind, folder, mode, victim = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]


def mpi():
    import numpy as np
    from mpi4py import MPI

    comm = MPI.COMM_WORLD

    def exchange(go):
        mine = np.full(1000, float(go))
        comm.Allreduce(MPI.IN_PLACE, mine)
        return mine[0] > 0

    return str(comm.rank), exchange


def horovod():
    import horovod.tensorflow as hvd
    import tensorflow as tf

    hvd.init()

    def exchange(go):
        return hvd.allreduce(tf.fill([1000], float(go)), op=hvd.Sum, name="exchange")[0] > 0

    return str(hvd.rank()), exchange


def parameter_server():
    import tensorflow as tf

    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    task = resolver.task_type, resolver.task_id
    if resolver.task_type != "chief":
        server = tf.distribute.Server(resolver.cluster_spec(), *task, protocol="grpc")
        return "{}{}".format(*task), lambda go: server is None  # it serves until it is ended
    strategy = tf.distribute.ParameterServerStrategy(resolver)
    coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
    with strategy.scope():
        total = tf.Variable(tf.zeros(1000))

    @tf.function
    def step():
        total.assign_add(tf.ones(1000))

    def exchange(go):
        for _ in range(4):
            coordinator.schedule(step)
        coordinator.join()
        return go

    return "{}{}".format(*task), exchange


def main():
    name, exchange = {"mpi": mpi, "horovod": horovod, "parameter_server": parameter_server}[kind]()
    exchange(False)
    (folder / f"works-{name}").touch()
    steps, go = 0, False
    while not go:
        time.sleep(0.05)
        if name == victim and (folder / "strike").exists():
            if mode == "raise":
                raise ValueError("bad batch")
            os._exit(int(mode))
        go = (folder / "go").exists()
        if mode != "compute":
            go = exchange(go)
            steps += 1
            if name in ("0", "chief0"):
                (folder / "steps").write_text(str(steps))


if __name__ == "__main__":
    main()
