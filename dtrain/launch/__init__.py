"""From a JobSpec to a finished run: plan, supervise, and one small module a launcher."""
