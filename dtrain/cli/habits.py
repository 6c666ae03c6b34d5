"""Options of mpirun, horovodrun, torchrun and srun that a hand may type, and what says the same here."""

from __future__ import annotations

import click

_ALL_RANKS = "use -n N, which counts all ranks"
_PER_HOST = "-H node1:N,node2:N starts N ranks on each host, and -n N alone N ranks on this one"
_HOSTS = "name the hosts (-H node1:N,node2:N), or with --launcher slurm say how many (--nodes)"

_SAID = {
    **dict.fromkeys(("--np", "--nprocs", "--num-proc", "--num-procs", "--num_processes", "--ntasks"), _ALL_RANKS),
    **dict.fromkeys(("--nproc_per_node", "--nproc-per-node", "--npernode", "--ppn"), _PER_HOST),
    **dict.fromkeys(("--nnodes", "--num_machines", "-N"), _HOSTS),
    "--ntasks-per-node": "use --tasks-per-node",
    "--hosts": "use -H node1:2,node2:2",
    **dict.fromkeys(("--machinefile", "-f"), "use --hostfile FILE"),
    **dict.fromkeys(("--export", "-x"), "the ranks have your environment as it is; --env NAME=VALUE adds to it"),
    **dict.fromkeys(("--bind-to", "--cpu-bind"), "use --bind core or --bind numa"),
    **dict.fromkeys(("--oversubscribe", "--allow-run-as-root", "--map-by"), "leave it out: dtrain tells mpirun itself"),
    "--mca": "set a variable: --env OMPI_MCA_NAME=VALUE",
}


class RunCommand(click.Command):
    """Refuses such an option with what to use, as it would any that is unknown."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            said = _SAID.get(error.option_name)
            if said is not None:
                raise click.NoSuchOption(error.option_name, f"No such option: {error.option_name}; {said}", ctx=ctx) from None
            raise
